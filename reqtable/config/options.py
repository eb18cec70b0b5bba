"""The options of each table of the configuration, as classes, and the check of their values' types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from reqtable.table.errors import ConfigurationError

if TYPE_CHECKING:
    from ipaddress import IPv4Network, IPv6Network

TLS_VERSIONS = ("1.2", "1.3")
ARGUMENT = "argument"
DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class ThreadOptions:
    """Policy `thread`. None: no bound. Above it, requests wait in the table."""

    threads_max: int | None = None

    def __post_init__(self) -> None:
        check(self, "thread.")


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """Policy `pool`: the number of its threads."""

    size: int = 8

    def __post_init__(self) -> None:
        check(self, "pool.")


@dataclass(frozen=True, slots=True)
class ForkOptions:
    """Policy `fork`. None: as the server class says (`max_children`, 40). Above it, requests wait in the table."""

    max_children: int | None = None

    def __post_init__(self) -> None:
        check(self, "fork.")


@dataclass(frozen=True, slots=True)
class ExecutorOptions:
    """An executor: `factory` is `module:callable`, called with `arguments`; None: a pool of processes.

    What it returns has the interface of `concurrent.futures.Executor`.
    """

    factory: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self, "executor.")
        if self.factory is not None and not all(self.factory.partition(":")):
            raise ConfigurationError(f"executor factory {self.factory!r}: write it as module:callable")


@dataclass(frozen=True, slots=True)
class Certificate:
    """Paths of PEM files: a certificate with its chain, and its key, which may be in the same file."""

    cert: str = ""
    key: str | None = None

    def __post_init__(self) -> None:
        check(self)
        if not self.cert:
            raise ConfigurationError("cert: name the file of the certificate")


@dataclass(frozen=True, slots=True)
class TLSOptions:
    """TLS of stream servers; without `cert` there is none. `names` has other certificates by the name asked for (SNI).

    With `client_ca`, clients are asked for a certificate of one of its authorities, and served without one only where
    it is not `client_cert_required`. `alpn` is the server's protocols, the most wanted first.
    """

    cert: str | None = None
    key: str | None = None
    names: Mapping[str, Certificate] = field(default_factory=dict)
    client_ca: str | None = None
    client_cert_required: bool = True
    min_version: str = "1.2"
    alpn: tuple[str, ...] = ()
    ciphers: str | None = None  # of TLS 1.2, as OpenSSL's ciphers(1) writes them

    def __post_init__(self) -> None:
        check(self, "tls.")
        if self.min_version not in TLS_VERSIONS:
            raise ConfigurationError(
                f"tls.min_version must be one of {', '.join(TLS_VERSIONS)}, not {self.min_version!r}"
            )
        for protocol in self.alpn:
            if not 0 < len(protocol.encode()) < 256:
                raise ConfigurationError(f"tls.alpn has {protocol!r}: a protocol's name has 1 to 255 bytes")
        for name, value in (("key", self.key), ("names", self.names), ("client_ca", self.client_ca)):
            if value and self.cert is None:
                raise ConfigurationError(f"tls.{name} is given, but no tls.cert: name the certificate's file there")


@dataclass(frozen=True, slots=True)
class ProxyOptions:
    """From whom a connection begins with a PROXY protocol header, and only from them.

    `trusted` are addresses and networks of IP; `unix` is everyone who comes by a Unix socket.
    """

    trusted: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check(self, "proxy.")
        self.networks()

    def networks(self) -> list[IPv4Network | IPv6Network]:
        """The networks of IP among them."""
        from ipaddress import ip_network  # only who has proxies needs it

        found = []
        for each in self.trusted:
            if each != "unix":
                try:
                    found.append(ip_network(each))
                except ValueError as error:
                    raise ConfigurationError(
                        f"proxy.trusted has {each!r}: {error}: write 10.0.0.1, 10.0.0.0/8, fd00::/8 or unix"
                    ) from None
        return found


_KINDS = {str: "a string", int: "a whole number above 0", bool: "true or false", tuple: "a list", Mapping: "a mapping"}
EXAMPLES = {
    "dispatch": '"pool"',
    "call_on": '"thread"',
    "limits": "Limits(entries_max=1000)",
    "thread": "ThreadOptions(threads_max=200)",
    "pool": "PoolOptions(size=8)",
    "fork": "ForkOptions(max_children=40)",
    "executor": 'ExecutorOptions(factory="module:callable")',
    "executors": '{"cluster": ExecutorOptions(factory="module:callable")}',
    "factory": '"module:callable"',
    "arguments": '{"max_workers": 4}',
    "tls": 'TLSOptions(cert="server.pem")',
    "cert": '"server.pem"',
    "key": '"server.key"',
    "names": '{"b.example": Certificate("b.pem")}',
    "client_ca": '"clients.pem"',
    "min_version": '"1.3"',
    "alpn": '["h2", "http/1.1"]',
    "ciphers": '"ECDHE+AESGCM"',
    "proxy": 'ProxyOptions(trusted=["10.0.0.0/8"])',
    "trusted": '["10.0.0.0/8", "unix"]',
    "origins": '{"dispatch": "argument"}',
}


def check(options: Any, prefix: str = "", origins: Mapping[str, str] | None = None) -> None:
    """Raise ConfigurationError for the first field whose value is not of the field's type.

    The error names the field (after `prefix`, and after its place among `origins`), and shows a value that it takes.
    """
    for name, hint in hints(options.__class__).items():
        value = getattr(options, name)
        if not _fits(value, hint):
            place = (origins or {}).get(name, ARGUMENT)
            where = "" if place == ARGUMENT else f"{place}: "
            raise ConfigurationError(
                f"{where}{prefix}{name} must be {_kind(name, hint)}, not {value!r}{_mend(value, hint)}"
            )


@cache
def hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type. Whole numbers are counts, so above 0; a list is as good as a tuple."""
    if hint is Any:
        return True
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return any(_fits(value, each) for each in arguments)
    if origin is tuple:
        return isinstance(value, tuple | list) and all(_fits(each, arguments[0]) for each in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(_fits(each, arguments[1]) for each in value.values())
    return isinstance(value, hint)


def _kind(name: str, hint: Any) -> str:
    """What a field takes, in words, with an example where the words alone leave a doubt."""
    hint = get_args(hint)[0] if get_origin(hint) is UnionType else hint
    kind = _KINDS.get(get_origin(hint) or hint) or hint.__name__
    return f"{kind}, such as {EXAMPLES[name]}" if name in EXAMPLES else kind


def _mend(value: Any, hint: Any) -> str:
    """A value that is no number at all may have been meant to say that there is no bound."""
    return " (or leave it out)" if type(None) in get_args(hint) and not isinstance(value, int) else ""
