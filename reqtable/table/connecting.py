"""The wants of `connect` and `start_tls`, and the addresses and TLS options that they are given. Pure data."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar

from reqtable.table.input import MISSING, Missing
from reqtable.table.places import caller
from reqtable.table.reaching import Reaching
from reqtable.table.want import Waiting, WantOf

_SCHEMES = ("tcp", "tls", "unix", "udp")
_ALPN_BYTES_MAX = 255  # of the name of a protocol (RFC 7301, 3.1)
_PATH_BYTES_MAX = 107  # unix(7): sun_path, and its NUL


@dataclass(frozen=True, slots=True)
class Target:
    """Holds the address of an outgoing connection. `host` is the path of a Unix socket, and `port` is 0 then."""

    scheme: str
    host: str
    port: int
    text: str

    @property
    def name(self) -> str:
        """The name, or the address without its scope, which a certificate must have."""
        return self.host.partition("%")[0]


@dataclass(frozen=True, slots=True)
class ClientTLS:
    """Says how an outgoing connection is secured. Paths are those of PEM files.

    `verify`: check the peer's certificate, by the certificates in `ca` (None: those of the system). `server_name` is
    the name that the certificate must have (None: the host of the address). `cert` and `key` are our own.
    """

    verify: bool = True
    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    server_name: str | None = None
    alpn: tuple[str, ...] = ()
    context: Any = None  # an ssl.SSLContext, in place of all but `server_name`

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name in ("ca", "cert", "key", "server_name") and not isinstance(value, str | None):
                raise TypeError(f"{each.name} must be a string, not {value!r}")
            if isinstance(value, str) and "\0" in value:
                raise ValueError(f"{each.name} must not have a NUL in it: {value!r}")
        try:
            (self.server_name or "").encode("idna")  # as OpenSSL is given it
        except UnicodeError as error:
            raise ValueError(f"server_name must be the name of a host, not {self.server_name!r} ({error})") from None
        if isinstance(self.alpn, str):
            raise TypeError(f"alpn: give a tuple, as in alpn=({self.alpn!r},), not a string")
        object.__setattr__(self, "alpn", tuple(self.alpn))  # hashable: contexts are kept by their options
        if not all(isinstance(each, str) and each.isascii() and 0 < len(each) <= _ALPN_BYTES_MAX for each in self.alpn):
            raise ValueError(f"alpn: give the names of protocols, as in alpn=('h2', 'http/1.1'), not {self.alpn!r}")
        if self.context is not None and not hasattr(self.context, "wrap_socket"):
            raise TypeError(f"context must be an ssl.SSLContext, not {self.context!r}")
        if self.key is not None and self.cert is None:
            raise ValueError("key: give the certificate of the key too, as cert")
        if self.context is not None and (not self.verify or self.ca or self.cert or self.alpn):
            raise ValueError("context: give either a context, or verify, ca, cert, key and alpn")


class Connect(Reaching[Any]):
    """Waits for an outgoing connection. The loop has the connection begun."""

    __slots__ = ("reuse", "target", "timeout", "tls")

    is_begun: ClassVar[bool] = False

    def __init__(self, target: Target, timeout: float | None, reuse: bool, tls: ClientTLS | None) -> None:
        self.target = target
        self.timeout = timeout
        self.reuse = reuse
        self.tls = tls

    @property
    def key(self) -> tuple[Any, ...]:
        """Two connections with an equal key can stand for each other."""
        return self.target.text, self.tls

    def take(self, entry: Waiting) -> Missing:
        return MISSING

    def __getattr__(self, name: str) -> Any:
        if name[:1] == "_":
            raise AttributeError(name)
        raise AttributeError(
            f"{self!r} is a want, not yet a connection, so it has no {name}: an async handler writes upstream = await "
            "self.read(connect(…)), and a state machine return self.name, connect(…)"
        )

    def __repr__(self) -> str:
        return f"connect({self.target.text!r})"


class StartTLS(Reaching[None]):
    """Waits until a connection is encrypted. `row` is the row of an outgoing connection; None: the client's own."""

    __slots__ = ("place", "row", "tls")

    is_begun: ClassVar[bool] = False

    def __init__(self, tls: Any, row: Any) -> None:
        self.tls = tls
        self.row = row
        self.place = caller()  # the user's line that asked for the handshake

    def take(self, entry: Waiting) -> Missing:
        return MISSING

    def __repr__(self) -> str:
        return "start_tls()" if self.row is None else f"start_tls() of {self.row.address}"


@dataclass(frozen=True, slots=True)
class ServerTLS:
    """Says how a client's connection is secured: by a certificate and its key, or by a context."""

    cert: str | None
    key: str | None
    context: Any


@lru_cache(maxsize=512)
def parse_target(text: str) -> Target:
    """Parse the address of an outgoing connection. Raises ValueError with the mend."""
    scheme, found, rest = text.partition("://")
    if not found or scheme not in _SCHEMES:
        raise _error(text, "write tcp://host:port, tls://host:port, udp://host:port or unix:///path")
    if scheme == "unix":
        if rest[:1] not in ("/", "@"):
            raise _error(text, "write an absolute path, as in unix:///run/x.sock, or an abstract name, as in unix://@x")
        if len(rest.encode("utf-8", "surrogateescape")) > _PATH_BYTES_MAX or "\0" in rest:
            raise _error(text, f"give a path of 1 to {_PATH_BYTES_MAX} bytes, as in unix:///run/x.sock")
        return Target(scheme, "\0" + rest[1:] if rest[0] == "@" else rest, 0, text)
    host, found, port = rest.rpartition(":")
    is_bracketed = host[:1] == "[" and host[-1:] == "]"
    if is_bracketed:
        host = host[1:-1]
    if not found or not host or (":" in host) != is_bracketed or any(each in host for each in "/?#@ []\0"):
        raise _error(text, f"write {scheme}://host:port, or {scheme}://[address]:port for IPv6")
    if "/" in port or "?" in port:
        raise _error(text, f"nothing may follow the port, but {port.lstrip('0123456789')!r} does")
    if not (port.isascii() and port.isdigit() and 0 < int(port) <= 65_535):
        raise _error(text, "give a port from 1 to 65535")
    return Target(scheme, host, int(port), text)


def _error(text: str, mend: str) -> ValueError:
    return ValueError(f"can't connect to {text!r}: {mend}")


def start_tls(*, cert: str | None = None, key: str | None = None, context: Any = None) -> WantOf[None]:
    """Encrypt the client's connection from here on (STARTTLS), as its server. The item is None.

    Give the PEM files of a certificate and its key, or an `ssl.SSLContext`. Queued output is sent before. If input has
    come before the handshake, the handler gets PeerError: an attacker may have inserted it (RFC 3207, 4.2). If the
    handshake fails, the handler gets a ConnectionError, and then sees the end of the input. Without a timeout,
    `handshake_timeout_s` holds. The handler must run on the loop: under `thread` and `fork` it gets HandlerError.
    Raises ValueError unless exactly one of `cert` and `context` is given, and TypeError for a wrong `context`.
    """
    if context is not None and not hasattr(context, "wrap_socket"):
        raise TypeError(f"context must be an ssl.SSLContext, not {context!r}")
    if (cert is None) == (context is None):
        raise ValueError("start_tls() takes cert='server.pem' (and key, if it is in another file), or a context")
    return StartTLS(ServerTLS(cert, key, context), None)
