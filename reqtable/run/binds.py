"""Binds: where a server listens, each as one string.

    tcp://127.0.0.1:7000    tcp://[::1]:7000    tcp://localhost:7000    udp://0.0.0.0:69
    tcp://:7000             every IPv4 address of this machine, with a warning; tcp://0.0.0.0:7000 is the same without
    tcp://[::]:7000         every IPv6 address, and every IPv4 address unless ?v6only=1
    tls://0.0.0.0:443       TLS as [tls] says; ?cert=FILE&key=FILE&client_ca=FILE override it
    unix:///run/x.sock      unixgram:///run/x.sock, both with ?mode=660&owner=NAME&group=NAME (or numbers)
    unix://@name            an abstract socket (unix(7)), without a file
    fd://3    fd://NAME     an open socket; by its name if systemd passed it (sd_listen_fds(3))

The other stream schemes speak TLS if they name a cert. ?proxy=ADDRESS,… says which proxies send PROXY protocol headers.
All binds are read, then all are checked, and only then is any of them bound.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote, urlsplit

from reqtable.config import Config, ProxyOptions, TLSOptions
from reqtable.table.errors import ConfigurationError

_PORT_MAX = 65_535
_PERMISSIONS = ("mode", "owner", "group")
_TLS = ("cert", "key", "client_ca")
_STREAM = (*_TLS, "proxy")
# The schemes, each with its options.
OPTIONS: dict[str, tuple[str, ...]] = {
    "tcp": ("v6only", *_STREAM),
    "tls": ("v6only", *_STREAM),
    "udp": ("v6only",),
    "unix": (*_PERMISSIONS, *_STREAM),
    "unixgram": _PERMISSIONS,
    "fd": _STREAM,
}
DATAGRAM_SCHEMES = {"udp", "unixgram"}


@dataclass(frozen=True, slots=True)
class Bind:
    """Holds the parts of one bind. `address` is `(host, port)`, or a path, or a descriptor's number or name."""

    text: str
    scheme: str
    address: Any
    options: Mapping[str, str]

    def configured(self, config: Config) -> Config:
        """Return `config` with what this bind overrides. Raises ConfigurationError."""
        named: Any = {name: self.options[name] for name in _TLS if name in self.options}
        try:
            tls = TLSOptions()
            if "cert" in named:
                tls = replace(config.tls, **({"key": None} | named))
            elif self.scheme == "tls":
                tls = replace(config.tls, **named)
                if tls.cert is None:
                    raise self.error("name a certificate: ?cert=server.pem here, or cert under [tls]")
            elif named:
                raise self.error(f"{' and '.join(named)} without a cert: name the certificate's file, too")
            trusted = self.options.get("proxy")
            proxy = config.proxy if trusted is None else ProxyOptions(tuple(trusted.split(",")))
            return replace(config, tls=tls, proxy=proxy)
        except ConfigurationError as error:
            raise error if str(error).startswith("bind ") else self.error(str(error)) from error

    def error(self, problem: str) -> ConfigurationError:
        """Return an error that names this bind and the problem."""
        return ConfigurationError(f"bind {self.text!r}: {problem}")


def parse_bind(text: str) -> Bind:
    """Read a bind. Raises ConfigurationError, which names the bind and the mend."""
    if not isinstance(text, str):
        raise ConfigurationError(f'bind {text!r}: a bind is a string, such as "tcp://127.0.0.1:7000"')
    scheme, separator, rest = text.partition("://")
    place, _, query = rest.partition("?")
    bind = Bind(text, scheme, _addresses.get(scheme, str)(place), dict(_pairs(query)))
    if not separator or scheme not in OPTIONS:
        known = ", ".join(each + "://…" for each in OPTIONS)
        raise bind.error(f"write it as one of {known}, such as {_likely(rest if separator else text)}")
    if bind.address is None:
        port = place.rpartition(":")[2]
        if _addresses[scheme] is _host_and_port and port.isdecimal() and int(port) > _PORT_MAX:
            raise bind.error(f"{port} is above {_PORT_MAX}, the highest port: choose another one")
        raise bind.error(_MEND[scheme].format(scheme=scheme))
    for name in bind.options:
        if name not in OPTIONS[scheme]:
            raise bind.error(f"there is no option {name!r}; there are {', '.join(OPTIONS[scheme]) or 'none'}")
    return bind


def _pairs(query: str) -> Iterable[tuple[str, str]]:
    for pair in filter(None, query.split("&")):
        name, _, value = pair.partition("=")
        yield unquote(name), unquote(value)  # not parse_qsl, which turns a plus into a space


def _host_and_port(place: str) -> tuple[str, int] | None:
    with contextlib.suppress(ValueError):
        parts = urlsplit("//" + place, allow_fragments=False)
        if parts.port is not None and not parts.path.strip("/") and "@" not in place:
            return parts.hostname or "", parts.port
    return None


def _likely(place: str) -> str:
    """Return the bind that the author of `place`, which has no scheme that we know, may have meant."""
    if place.startswith("/"):
        return f"unix://{place}"
    if place.isdecimal():
        return f"tcp://127.0.0.1:{place}"
    return "tcp://127.0.0.1:7000" if _host_and_port(place.rstrip("/")) is None else f"tcp://{place.rstrip('/')}"


def _path(place: str) -> str | None:
    if place.startswith("@"):
        return "\0" + place[1:] if place[1:] else None
    return place if place.strip("/") else None


def _descriptor(place: str) -> int | str | None:
    return int(place) if place.isdecimal() else place or None


_addresses: dict[str, Callable[[str], Any]] = {
    "tcp": _host_and_port,
    "tls": _host_and_port,
    "udp": _host_and_port,
    "unix": _path,
    "unixgram": _path,
    "fd": _descriptor,
}
_MEND = {
    "tcp": "give a host and a port, as in {scheme}://127.0.0.1:7000",
    "tls": "give a host and a port, as in {scheme}://127.0.0.1:7000",
    "udp": "give a host and a port, as in {scheme}://127.0.0.1:7000",
    "unix": "give a path, as in {scheme}:///run/app.sock",
    "unixgram": "give a path, as in {scheme}:///run/app.sock",
    "fd": "give a descriptor's number, as in fd://3, or its name",
}
