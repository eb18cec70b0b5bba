"""Binds: where a server listens, each as one string.

    tcp://127.0.0.1:7000    tcp://[::1]:7000    tcp://localhost:7000    udp://0.0.0.0:69
    tcp://:7000             every IPv4 address of this machine, with a warning; tcp://0.0.0.0:7000 says the same
    tcp://[::]:7000         IPv4 too; ?v6only=1: IPv6 alone
    tls://0.0.0.0:443       with TLS, as [tls] says; ?cert=FILE&key=FILE&client_ca=FILE in place of what that says
    unix:///run/x.sock      unixgram:///run/x.sock, both with ?mode=660&owner=NAME&group=NAME (or numbers)
    unix://@name            an abstract one (unix(7)), without a file
    fd://3    fd://NAME     a socket that is open already; by its name where systemd passed it (sd_listen_fds(3))

A stream of the others speaks TLS where it names a cert. ?proxy=ADDRESS,… says who sends PROXY protocol headers there.
They are read, then all of them are checked, and only then is any of them bound.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from reqtable.config import Config, ProxyOptions, TLSOptions
from reqtable.dispatch import is_resumable
from reqtable.dispatch.policies.greenlet import policy_for_blocking
from reqtable.server.classes import TCPServer, UDPServer, remove_dead
from reqtable.table.addresses import address_text
from reqtable.table.errors import ConfigurationError

log = logging.getLogger("reqtable")

_PERMISSIONS = ("mode", "owner", "group")
_TLS = ("cert", "key", "client_ca")
_STREAM = (*_TLS, "proxy")
# The schemes, and the options of each.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "tcp": ("v6only", *_STREAM),
    "tls": ("v6only", *_STREAM),
    "udp": ("v6only",),
    "unix": (*_PERMISSIONS, *_STREAM),
    "unixgram": _PERMISSIONS,
    "fd": _STREAM,
}
_DATAGRAM = {"udp", "unixgram"}

_FIRST_PASSED = 3  # SD_LISTEN_FDS_START
_PATH_BYTES_MAX = 107  # unix(7): sun_path, and its NUL
_CAP_CHOWN, _CAP_NET_BIND_SERVICE = 0, 10  # capabilities(7)
_FORBIDDEN = {errno.EACCES, errno.EPERM}


# -- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bind:
    """What one string says. `address` is `(host, port)`, or a path, or a descriptor's number or name."""

    text: str
    scheme: str
    address: Any
    options: Mapping[str, str]

    def configured(self, config: Config) -> Config:
        """That configuration, as it holds for this bind. Raises ConfigurationError."""
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
        """That it can't be, with the bind's name before it."""
        return ConfigurationError(f"bind {self.text!r}: {problem}")


def parse_bind(text: str) -> Bind:
    """Read a bind. Raises ConfigurationError, naming it and the mend."""
    if not isinstance(text, str):
        raise ConfigurationError(f'bind {text!r}: a bind is a string, such as "tcp://127.0.0.1:7000"')
    scheme, separator, rest = text.partition("://")
    place, _, query = rest.partition("?")
    bind = Bind(text, scheme, _addresses.get(scheme, str)(place), dict(_pairs(query)))
    if not separator or scheme not in _OPTIONS:
        known = ", ".join(each + "://…" for each in _OPTIONS)
        raise bind.error(f"write it as one of {known}, such as tcp://127.0.0.1:7000")
    if bind.address is None:
        raise bind.error(_MEND[scheme].format(scheme=scheme))
    for name in bind.options:
        if name not in _OPTIONS[scheme]:
            raise bind.error(f"there is no option {name!r}; there are {', '.join(_OPTIONS[scheme]) or 'none'}")
    return bind


def _pairs(query: str) -> Iterable[tuple[str, str]]:
    for pair in filter(None, query.split("&")):
        name, _, value = pair.partition("=")
        yield unquote(name), unquote(value)  # not parse_qsl, which makes a space of a plus


def _host_and_port(place: str) -> tuple[str, int] | None:
    parts = urlsplit("//" + place, allow_fragments=False)
    with contextlib.suppress(ValueError):
        if parts.port is not None and not parts.path.strip("/") and "@" not in place:
            return parts.hostname or "", parts.port
    return None


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


# -- what systemd has passed ------------------------------------------------------------------------------------------


def is_activated() -> bool:
    """Whether systemd has passed sockets to this very process (sd_listen_fds(3))."""
    return os.environ.get("LISTEN_PID") == str(os.getpid())


def take_passed() -> list[tuple[int, str]]:
    """The descriptors that systemd has passed, and their names; children and other programs don't get them.

    Raises ConfigurationError where the environment does not say how many.
    """
    if not is_activated():
        return []
    count = os.environ.get("LISTEN_FDS", "")
    if not count.isdecimal():
        raise ConfigurationError(f"environment LISTEN_FDS: {count!r} is not a number of descriptors")
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    for variable in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(variable, None)
    passed = [(_FIRST_PASSED + i, names[i] if i < len(names) else "") for i in range(int(count))]
    for number, _ in passed:
        with contextlib.suppress(OSError):  # one that is not open is refused by its bind
            os.set_inheritable(number, False)
    return passed


# -- checking ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """Where a bind is, all of it looked up: what bind(2) takes, or the descriptor of what is bound already."""

    bind: Bind
    family: int
    kind: int
    address: Any
    descriptor: int | None = None
    v6only: bool = False
    mode: int | None = None
    owner: int = -1  # chown(2): -1 leaves it as it is
    group: int = -1

    @property
    def has_file(self) -> bool:
        """It makes a Unix socket's file."""
        return self.descriptor is None and self.family == socket.AF_UNIX and self.address[0] != "\0"


def find_places(texts: Iterable[str]) -> list[Place]:
    """Read and check binds, or, where there are none, those that systemd has passed.

    Raises ConfigurationError where one can't be, or is there twice, before anything is bound.
    """
    passed = take_passed()
    binds = [parse_bind(text) for text in texts] or [parse_bind(f"fd://{number}") for number, _ in passed]
    if not binds:
        raise ConfigurationError("serve() needs at least one bind, such as tcp://127.0.0.1:7000")
    places = [place for bind in binds for place in _places_of(bind, passed)]
    found: dict[Any, Place] = {}
    for place in places:
        key = (place.kind, place.family, place.address) if place.descriptor is None else place.descriptor
        takes_any_port = isinstance(place.address, tuple) and not place.address[1]
        if key in found and not takes_any_port:
            raise place.bind.error(f"it is there twice, the first time as {found[key].bind.text!r}: leave one out")
        found[key] = place
    return places


def _places_of(bind: Bind, passed: list[tuple[int, str]]) -> list[Place]:
    """Of most binds one; of a name that systemd has passed, as many as have it."""
    if bind.scheme == "fd":
        return [_place_of_descriptor(bind, number) for number in _numbers(bind, passed)]
    return [_place_of_path(bind) if isinstance(bind.address, str) else _place_of_host(bind)]


def _numbers(bind: Bind, passed: list[tuple[int, str]]) -> list[int]:
    if isinstance(bind.address, int):
        return [bind.address]
    numbers = [number for number, name in passed if name == bind.address]
    if not numbers:
        known = ", ".join(sorted({name for _, name in passed if name})) or "none"
        raise bind.error(f"systemd has passed no socket of that name; names that it passed: {known}")
    return numbers


def _place_of_descriptor(bind: Bind, number: int) -> Place:
    try:
        with socket_at(number) as own:
            is_stream = own.type == socket.SOCK_STREAM
            if not is_stream and own.type != socket.SOCK_DGRAM:
                raise bind.error("a socket of neither streams nor datagrams: choose another one")
            if not is_stream and bind.options:
                raise bind.error(
                    f"{', '.join(bind.options)}: for streams, and this socket is of datagrams: leave it out"
                )
            if is_stream and _is_connected(own):
                raise bind.error("a connection, not a listening socket: with systemd, say Accept=no")
            return Place(bind, own.family, own.type, own.getsockname(), number)
    except OSError as error:
        raise bind.error(f"{_reason(error)}: pass a socket that is bound") from error


def _is_connected(own: socket.socket) -> bool:
    with contextlib.suppress(OSError):
        own.getpeername()
        return True
    return False


def _place_of_host(bind: Bind) -> Place:
    host, port = bind.address
    kind = _kind(bind)
    try:
        found = socket.getaddrinfo(host or "0.0.0.0", port, type=kind, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise bind.error(f"{_reason(error)}: give an address, or a name that is known here") from error
    family, _, _, _, address = found[0]
    v6only = bind.options.get("v6only", "0")
    if v6only not in ("0", "1") or (v6only == "1" and family != socket.AF_INET6):
        raise bind.error("v6only is 0 or 1, and for addresses of IPv6")
    if 0 < port < _first_unprivileged_port() and not _may(_CAP_NET_BIND_SERVICE):
        first = _first_unprivileged_port()
        raise bind.error(
            f"this user may not take port {port}: choose one from {first}, or give it CAP_NET_BIND_SERVICE"
        )
    return Place(bind, family, kind, address, v6only=v6only == "1")


def _place_of_path(bind: Bind) -> Place:
    path = bind.address
    if len(os.fsencode(path)) > _PATH_BYTES_MAX:
        raise bind.error(f"a Unix socket's path has at most {_PATH_BYTES_MAX} bytes: choose a shorter one")
    if path[0] == "\0":
        if bind.options:
            raise bind.error("an abstract socket has no file, so no permissions: give a path, or no options")
        return Place(bind, socket.AF_UNIX, _kind(bind), path)
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise bind.error(f"there is no directory {folder}: make it, or choose another one")
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise bind.error(f"this user may not write to {folder}: choose another one")
    return Place(bind, socket.AF_UNIX, _kind(bind), path, mode=_mode(bind), owner=_owner(bind), group=_group(bind))


def _kind(bind: Bind) -> int:
    return socket.SOCK_DGRAM if bind.scheme in _DATAGRAM else socket.SOCK_STREAM


def _mode(bind: Bind) -> int | None:
    mode = bind.options.get("mode")
    if mode is not None and not re.fullmatch("0?[0-7]{3}", mode):
        raise bind.error(f"mode {mode!r}: give three octal digits, as in mode=660")
    return None if mode is None else int(mode, 8)


def _owner(bind: Bind) -> int:
    from pwd import getpwnam  # as grp below: only who names a user needs it

    owner = _number_of(bind, "owner", lambda name: getpwnam(name).pw_uid)
    if owner not in (-1, os.geteuid()) and not _may(_CAP_CHOWN):
        raise bind.error(f"this user may not give its file to {bind.options['owner']}: leave owner out")
    return owner


def _group(bind: Bind) -> int:
    from grp import getgrnam

    group = _number_of(bind, "group", lambda name: getgrnam(name).gr_gid)
    if group not in (-1, os.getegid(), *os.getgroups()) and not _may(_CAP_CHOWN):
        raise bind.error(f"this user is not in group {bind.options['group']}: choose one of its own")
    return group


def _number_of(bind: Bind, option: str, look_up: Callable[[str], int]) -> int:
    name = bind.options.get(option)
    if name is None:
        return -1
    try:
        return int(name) if name.isdecimal() else look_up(name)
    except KeyError:
        raise bind.error(f"{option}: there is no {name!r} here") from None


def _first_unprivileged_port() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    except (OSError, ValueError):
        return 1024


def _may(capability: int) -> bool:
    """Whether this process has that capability; where there are none, whether it is root's."""
    with contextlib.suppress(OSError):
        if found := re.search(r"^CapEff:\s*([0-9a-f]+)$", Path("/proc/self/status").read_text(), re.MULTILINE):
            return bool(int(found[1], 16) >> capability & 1)
    return os.geteuid() == 0


# -- opening ----------------------------------------------------------------------------------------------------------


class _Placed:
    """In front of a server class: it binds to its `place`."""

    place: Place
    daemon_threads = (
        True  # requests have had `drain_timeout_s` to end: a thread that never does must not hold up the exit
    )

    if TYPE_CHECKING:  # what the class behind it has
        socket: socket.socket
        server_address: Any
        _begins_with_tls: bool

    def _prepared(self, config: Config) -> tuple[Callable[[], None], Callable[[], None]]:
        return super()._prepared(self.place.bind.configured(config))  # type: ignore[misc,no-any-return]

    def server_bind(self) -> None:
        place = self.place
        if place.descriptor is not None:
            self.socket.close()
            self.socket = socket_at(place.descriptor)
            self.server_address = self.socket.getsockname()
            return
        if place.family == socket.AF_INET6:  # whatever the machine's default is
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, place.v6only)
        if place.mode is not None:
            with contextlib.suppress(OSError):  # only Linux; elsewhere streams are safe, as nothing listens yet
                os.fchmod(self.socket.fileno(), place.mode & 0o700)
        super().server_bind()  # type: ignore[misc]
        if place.has_file:
            self._permit(place)

    def _permit(self, place: Place) -> None:
        """Give the file, which was made with its owner's permissions alone, to whom it is for; then open it to them."""
        try:
            if (place.owner, place.group) != (-1, -1):
                os.chown(place.address, place.owner, place.group, follow_symlinks=False)
            if place.mode is not None:
                os.chmod(place.address, place.mode)
        except BaseException:
            os.unlink(place.address)
            raise


class _Stream(_Placed, TCPServer):
    allow_reuse_address = True


class _Datagram(_Placed, UDPServer):
    max_packet_size = 65_535  # the largest there is: nothing is cut


def make_server(place: Place, handler: Any, dispatch: str | None, config: Config) -> TCPServer:
    """The server of a place, not bound. Raises ConfigurationError where the handler can't be served so."""
    base: type[TCPServer] = _Stream if place.kind == socket.SOCK_STREAM else _Datagram
    default = "inline" if is_resumable(handler) else policy_for_blocking()
    own = {"address_family": place.family, "place": place, "dispatch": default}
    made: type[TCPServer] = type(base.__name__, (base,), own)
    configured = place.bind.configured(config)
    return made(place.address, handler, bind_and_activate=False, dispatch=dispatch, config=configured)


def open_server(server: TCPServer) -> Callable[[], None]:
    """Bind it. Returns what removes the file that this made, if it did.

    Raises OSError, naming the bind and the mend; ConfigurationError where this user may not.
    """
    place: Place = server.place  # type: ignore[attr-defined]
    try:
        server.server_bind()
        server._keep_alive()  # also where workers serve: a supervisor that reads the configuration again must know it
        _warn_without_host(place.bind)
        remove = _remover(server)
        try:
            server.server_activate()
        except BaseException:
            remove()
            raise
        return remove
    except OSError as error:
        if error.errno in _FORBIDDEN:
            raise place.bind.error(f"{_reason(error)}: choose a place that this user may have") from error
        mend = "stop what is there, or choose another one" if error.errno == errno.EADDRINUSE else "choose another one"
        raise OSError(error.errno, f"bind {place.bind.text!r}: {_reason(error)}: {mend}") from error


def _warn_without_host(bind: Bind) -> None:
    """Say how far a bind without a host reaches: its author may have meant programs on this machine only."""
    host, port = bind.address if isinstance(bind.address, tuple) else (None, None)
    if host == "":
        log.warning(
            "bind %r: no host is given, so it listens on every IPv4 address of this machine: write %s for programs on "
            "this machine only, %s for every IPv4 address, %s for IPv6, too",
            bind.text,
            *(f"{bind.scheme}://{each}:{port}" for each in ("127.0.0.1", "0.0.0.0", "[::]")),
        )


def name_of(server: TCPServer) -> str:
    """Where it really listens, as a bind."""
    own = server.socket
    stream = own.type == socket.SOCK_STREAM
    scheme = ("unix" if stream else "unixgram") if own.family == socket.AF_UNIX else ("tcp" if stream else "udp")
    if scheme == "tcp" and server._begins_with_tls:
        scheme = "tls"
    return f"{scheme}://{address_text(server.server_address)}"


def socket_at(descriptor: int) -> socket.socket:
    """Our own duplicate of a socket that is open already. Raises OSError where it is none."""
    duplicate = os.dup(descriptor)
    try:
        return socket.socket(fileno=duplicate)
    except BaseException:
        os.close(duplicate)
        raise


def _remover(server: TCPServer) -> Callable[[], None]:
    """What removes a Unix socket's file, unless someone else has put theirs in its place."""
    place: Place = server.place  # type: ignore[attr-defined]
    if not place.has_file:
        return lambda: None
    own = _file_at(place.address)

    def remove() -> None:
        with contextlib.suppress(OSError):
            if _file_at(place.address) != own:
                return
            if server.fileno() >= 0:
                os.unlink(place.address)  # no server replaces it while it is bound
            else:
                remove_dead(place.address)  # closed by a drain: a file of the same number may be another server's

    return remove


def _file_at(path: str) -> tuple[int, int]:
    """What tells one file from another, as long as both are there."""
    found = os.lstat(path)
    return found.st_dev, found.st_ino


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()
