"""The options of the configuration: a class for each table, and a check of the values' types."""

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
UNMOVABLE = ("drain", "refuse")
ARGUMENT = "argument"
"""Where a value came from: from the program, or from the command line."""

DEFAULT = "default"
"""Where a value came from: nothing has set it."""


@dataclass(frozen=True, slots=True)
class ThreadOptions:
    """Sets the options of policy `thread`."""

    threads_max: int | None = None
    """The most threads at the same time; above this number, requests wait in the table. Set it if a thread costs much
    memory, or if a database allows few connections."""

    reuse: bool = False
    """Whether a thread that has served its request waits a while for the next one. It makes short requests cheaper. But
    data that a handler puts into a `threading.local` then outlives the request."""

    def __post_init__(self) -> None:
        check(self, "thread.")


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """Sets the options of policy `pool`."""

    size: int = 8
    """The number of threads. Raise it if steps mostly wait; set it to the number of processors if they compute."""

    def __post_init__(self) -> None:
        check(self, "pool.")


@dataclass(frozen=True, slots=True)
class ForkOptions:
    """Sets the options of policy `fork`."""

    max_children: int | None = None
    """The most children at the same time; above this number, requests wait in the table. None: the server class decides
    (its `max_children`, by default 40). Set it by the memory that one child needs."""

    def __post_init__(self) -> None:
        check(self, "fork.")


@dataclass(frozen=True, slots=True)
class GreenletOptions:
    """Sets the options of policy `greenlet`."""

    suspend_all_sockets: bool = False
    """Whether any wait of a blocking handler suspends only its request: any socket, `select`, `time.sleep`, a name
    look-up. Otherwise only the request's own socket does. Set it for handlers that use other services."""

    def __post_init__(self) -> None:
        check(self, "greenlet.")


@dataclass(frozen=True, slots=True)
class ExecutorOptions:
    """Sets the options of an executor."""

    factory: str | None = None
    """`module:callable`, which is called with `arguments`. The result must have the interface of
    `concurrent.futures.Executor`. None: a pool of processes. Set it for a cluster, or for another kind of pool."""

    arguments: Mapping[str, Any] = field(default_factory=dict)
    """The arguments of `factory`, by name. Set what the factory needs, such as an address or a number of processes."""

    def __post_init__(self) -> None:
        check(self, "executor.")
        if self.factory is not None and not all(self.factory.partition(":")):
            raise ConfigurationError(f"executor factory {self.factory!r}: write it as module:callable")


@dataclass(frozen=True, slots=True)
class Certificate:
    """Names PEM files: a certificate with its chain, and its key."""

    cert: str = ""
    """The path of the certificate with its chain."""

    key: str | None = None
    """The path of the key. None: it is in the same file as the certificate."""

    def __post_init__(self) -> None:
        check(self)
        if not self.cert:
            raise ConfigurationError("cert: name the file of the certificate")


@dataclass(frozen=True, slots=True)
class TLSOptions:
    """Sets the TLS options of stream servers."""

    cert: str | None = None
    """The path of the PEM file with the certificate and its chain. None: no TLS. Set it for `tls://` binds."""

    key: str | None = None
    """The path of the PEM file with the key. None: it is in the file of `cert`."""

    names: Mapping[str, Certificate] = field(default_factory=dict)
    """Other certificates, by the name that a client asks for (SNI), such as `"b.example"` or `"*.example"`. Set it if
    one address serves several names."""

    client_ca: str | None = None
    """The path of a PEM file with authorities. Clients are then asked for a certificate of one of them. Set it to serve
    only clients that you know."""

    client_cert_required: bool = True
    """Whether a client without a certificate is refused, if there is a `client_ca`. Set it to false if the handler
    decides by `self.tls.getpeercert()`."""

    min_version: str = "1.2"
    """The oldest version of TLS that is accepted: `"1.2"` or `"1.3"`. Raise it if all your clients know TLS 1.3."""

    alpn: tuple[str, ...] = ()
    """The protocols that the server offers, the preferred one first (RFC 7301). Set it if clients choose one by
    name."""

    ciphers: str | None = None
    """The ciphers of TLS 1.2, in the format of OpenSSL's ciphers(1). None: those of Python's `ssl`. Set it if a policy
    of your organisation demands it."""

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
    """Names the proxies in front of the server."""

    trusted: tuple[str, ...] = ()
    """IP addresses and networks. Connections from them, and no others, begin with a PROXY protocol header. `"unix"`
    stands for every connection by a Unix socket. Set it if a proxy sends such headers; name no address that clients can
    use."""

    def __post_init__(self) -> None:
        check(self, "proxy.")
        self.networks()

    def networks(self) -> list[IPv4Network | IPv6Network]:
        """Return the IP addresses and networks in `trusted`, as networks. Raises ConfigurationError."""
        from ipaddress import ip_network  # imported here: only servers with proxies need it

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


@dataclass(frozen=True, slots=True)
class ControlOptions:
    """Says where an operator reaches the control API."""

    socket: str | None = None
    """The path of the Unix socket of the control API. `REQTABLE_CONTROL` is used if this key is not set. None: the
    commands that serve open one that `reqtable ps` finds; other programs open none. Set it if operators need a fixed
    place."""

    page: str | None = None
    """The `host:port` of the live page. The page is read-only without a `token`. Set it to look at a server in a
    browser; use an address that only operators can reach."""

    metrics: str | None = None
    """The `host:port` of the metrics for Prometheus. It is read-only. Set it if Prometheus watches the server; use an
    address that only the monitoring can reach."""

    token: str | None = None
    """A long random text, which allows actions on the page. Set it if operators may end requests and change limits
    there."""

    def __post_init__(self) -> None:
        check(self, "control.")
        for name in ("page", "metrics"):
            value = getattr(self, name)
            if value is not None:
                host, _, port = value.rpartition(":")
                if "/" in host or not host or not port.isascii() or not port.isdigit() or int(port) > 65_535:
                    raise ConfigurationError(f"control.{name} must be host:port, such as 127.0.0.1:9100, not {value!r}")

    @property
    def is_on(self) -> bool:
        """Whether there is anything to open."""
        return any((self.socket, self.page, self.metrics))


@dataclass(frozen=True, slots=True)
class RestartOptions:
    """Sets how the next version of the program takes the place of this one."""

    command: tuple[str, ...] = ()
    """The command that starts the next version. Empty: the program is started as this process was. Set it if the new
    version has another path or other arguments."""

    start_timeout_s: float = 30.0
    """The time until the next version must be ready; otherwise this version goes on. Raise it if the program loads
    much when it starts."""

    slice_rows: int = 250
    """The number of requests that are frozen at the same time. Lower it for shorter pauses; raise it above the number
    of requests if requests need each other while they move."""

    unmovable: str = "drain"
    """The fate of requests that can't move: `"drain"` lets them finish in this process, `"refuse"` refuses the
    restart. Set it to `"refuse"` if the old process must not remain."""

    def __post_init__(self) -> None:
        check(self, "restart.")
        if self.unmovable not in UNMOVABLE:
            raise ConfigurationError(f"restart.unmovable must be one of {', '.join(UNMOVABLE)}, not {self.unmovable!r}")


_KINDS = {
    float: "a number of seconds above 0",
    str: "a string",
    int: "a whole number above 0",
    bool: "true or false",
    tuple: "a list",
    Mapping: "a mapping",
}
EXAMPLES = {
    "dispatch": '"pool"',
    "call_on": '"thread"',
    "limits": "Limits(entries_max=1000)",
    "thread": "ThreadOptions(threads_max=200)",
    "pool": "PoolOptions(size=8)",
    "fork": "ForkOptions(max_children=40)",
    "greenlet": "GreenletOptions(suspend_all_sockets=True)",
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
    "control": 'ControlOptions(socket="/run/notes.sock")',
    "socket": '"/run/notes.sock"',
    "page": '"127.0.0.1:9101"',
    "token": '"a long random text"',
    "metrics": '"127.0.0.1:9100"',
    "restart": "RestartOptions(slice_rows=100)",
    "command": '["/usr/bin/notes", "--serve"]',
    "start_timeout_s": "60",
    "slice_rows": "100",
    "unmovable": '"refuse"',
    "origins": '{"dispatch": "argument"}',
}


def check(options: Any, prefix: str = "", origins: Mapping[str, str] | None = None) -> None:
    """Raise ConfigurationError for the first field whose value is not of the field's type.

    The error names the field, after its place from `origins` and after `prefix`. It also shows a valid value.
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
    """Return whether a value is of a field's type. Whole numbers must be above 0. A list passes for a tuple."""
    if hint is Any:
        return True
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return any(_fits(value, each) for each in arguments)
    if origin is tuple:
        return isinstance(value, tuple | list) and all(_fits(each, arguments[0]) for each in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(_fits(each, arguments[1]) for each in value.values())
    return isinstance(value, hint)


def _kind(name: str, hint: Any) -> str:
    """Describe what a field takes, with an example if EXAMPLES has one."""
    hint = get_args(hint)[0] if get_origin(hint) is UnionType else hint
    kind = _KINDS.get(get_origin(hint) or hint) or hint.__name__
    return f"{kind}, such as {EXAMPLES[name]}" if name in EXAMPLES else kind


def _mend(value: Any, hint: Any) -> str:
    """Return a hint for an optional field: a value that is not a number may have been meant as "no bound"."""
    return " (or leave it out)" if type(None) in get_args(hint) and not isinstance(value, int) else ""
