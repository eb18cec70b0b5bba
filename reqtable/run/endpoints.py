"""Endpoints: binds whose hosts, files and users have been looked up on this machine, and checked before binding."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reqtable.run.activation import take_passed
from reqtable.run.binds import DATAGRAM_SCHEMES, Bind, parse_bind
from reqtable.table.errors import ConfigurationError

_PATH_BYTES_MAX = 107  # unix(7): sun_path, and its NUL
_CAP_CHOWN, _CAP_NET_BIND_SERVICE = 0, 10  # capabilities(7)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Holds what a bind resolves to: the address for bind(2), or the descriptor of a socket that is bound already."""

    bind: Bind
    family: int
    kind: int
    address: Any
    descriptor: int | None = None
    v6only: bool = False
    mode: int | None = None
    owner: int = -1  # chown(2): -1 changes nothing
    group: int = -1
    is_inherited: bool = False  # the descriptor comes from the process whose place this one takes

    @property
    def key(self) -> str:
        """The name of the endpoint in the next version of the program, which may have other options for it."""
        return self.bind.text if self.bind.scheme == "fd" else f"{self.family} {self.kind} {self.address}"

    @property
    def has_file(self) -> bool:
        """Whether the endpoint has a Unix socket's file, which this process is to remove."""
        return self.bind.scheme != "fd" and self.family == socket.AF_UNIX and self.address[0] != "\0"


def find_endpoints(texts: Iterable[str], offered: Iterable[tuple[int, str]] = ()) -> list[Endpoint]:
    """Read and check binds. Without any, take the sockets that systemd has passed.

    `offered` are descriptors that the process before offers, each with the key of its endpoint: if systemd has passed
    them, it has passed them to that process only.

    Raises ConfigurationError, before anything is bound, if a bind can't be used or is given twice.
    """
    passed = take_passed()
    kept = [(number, key) for number, key in offered if key.startswith("fd://")]
    binds = [parse_bind(text) for text in texts]
    binds = binds or [parse_bind(text) for text in dict.fromkeys(key for _, key in kept)]
    binds = binds or [parse_bind(f"fd://{number}") for number, _ in passed]
    if not binds:
        raise ConfigurationError("serve() needs at least one bind, such as tcp://127.0.0.1:7000")
    places = [place for bind in binds for place in _endpoints_of(bind, passed, kept)]
    found: dict[Any, Endpoint] = {}
    for place in places:
        key = (place.kind, place.family, place.address) if place.descriptor is None else place.descriptor
        takes_any_port = isinstance(place.address, tuple) and not place.address[1]
        if key in found and not takes_any_port:
            raise place.bind.error(f"it is given twice, first as {found[key].bind.text!r}: leave one out")
        found[key] = place
    return places


def _endpoints_of(bind: Bind, passed: list[tuple[int, str]], kept: list[tuple[int, str]]) -> list[Endpoint]:
    """Return the endpoints of a bind: one, except that systemd may pass several sockets by the same name."""
    if bind.scheme == "fd":
        numbers = [number for number, key in kept if key == bind.text] or _numbers(bind, passed)
        return [_endpoint_of_descriptor(bind, number) for number in numbers]
    return [_endpoint_of_path(bind) if isinstance(bind.address, str) else _endpoint_of_host(bind)]


def _numbers(bind: Bind, passed: list[tuple[int, str]]) -> list[int]:
    if isinstance(bind.address, int):
        return [bind.address]
    numbers = [number for number, name in passed if name == bind.address]
    if not numbers:
        known = ", ".join(sorted({name for _, name in passed if name})) or "none"
        raise bind.error(f"systemd has passed no socket of that name; names that it passed: {known}")
    return numbers


def _endpoint_of_descriptor(bind: Bind, number: int) -> Endpoint:
    try:
        with socket_at(number) as own:
            is_stream = own.type == socket.SOCK_STREAM
            if not is_stream and own.type != socket.SOCK_DGRAM:
                raise bind.error("neither a stream nor a datagram socket: choose another one")
            if not is_stream and bind.options:
                raise bind.error(
                    f"{', '.join(bind.options)}: for stream sockets, but this is a datagram socket: leave it out"
                )
            if is_stream and _is_connected(own):
                raise bind.error("a connection, not a listening socket: with systemd, say Accept=no")
            return Endpoint(bind, own.family, own.type, own.getsockname(), number)
    except OSError as error:
        raise bind.error(f"{reason_of(error)}: pass a socket that is bound") from error


def _is_connected(own: socket.socket) -> bool:
    with contextlib.suppress(OSError):
        own.getpeername()
        return True
    return False


def _endpoint_of_host(bind: Bind) -> Endpoint:
    host, port = bind.address
    kind = _kind(bind)
    try:
        found = socket.getaddrinfo(host or "0.0.0.0", port, type=kind, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise bind.error(f"{reason_of(error)}: give an address, or a name that is known here") from error
    family, _, _, _, address = found[0]
    v6only = bind.options.get("v6only", "0")
    if v6only not in ("0", "1") or (v6only == "1" and family != socket.AF_INET6):
        raise bind.error("v6only is 0 or 1, and for IPv6 addresses only")
    if 0 < port < _first_unprivileged_port() and not _may(_CAP_NET_BIND_SERVICE):
        first = _first_unprivileged_port()
        raise bind.error(
            f"this user may not take port {port}: choose one from {first}, or give it CAP_NET_BIND_SERVICE"
        )
    return Endpoint(bind, family, kind, address, v6only=v6only == "1")


def _endpoint_of_path(bind: Bind) -> Endpoint:
    path = bind.address
    if len(os.fsencode(path)) > _PATH_BYTES_MAX:
        raise bind.error(f"a Unix socket's path has at most {_PATH_BYTES_MAX} bytes: choose a shorter one")
    if path[0] == "\0":
        if bind.options:
            raise bind.error("an abstract socket has no file, so no permissions: give a path, or no options")
        return Endpoint(bind, socket.AF_UNIX, _kind(bind), path)
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise bind.error(f"there is no directory {folder}: make it, or choose another one")
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise bind.error(f"this user may not write to {folder}: choose another one")
    return Endpoint(bind, socket.AF_UNIX, _kind(bind), path, mode=_mode(bind), owner=_owner(bind), group=_group(bind))


def _kind(bind: Bind) -> int:
    return socket.SOCK_DGRAM if bind.scheme in DATAGRAM_SCHEMES else socket.SOCK_STREAM


def _mode(bind: Bind) -> int | None:
    mode = bind.options.get("mode")
    if mode is not None and not re.fullmatch("0?[0-7]{3}", mode):
        raise bind.error(f"mode {mode!r}: give three octal digits, as in mode=660")
    return None if mode is None else int(mode, 8)


def _owner(bind: Bind) -> int:
    from pwd import getpwnam  # here, as grp below: few binds name a user

    owner = _number_of(bind, "owner", lambda name: getpwnam(name).pw_uid)
    if owner not in (-1, os.geteuid()) and not _may(_CAP_CHOWN):
        raise bind.error(f"this user may not give its file to {bind.options['owner']}: leave owner out")
    return owner


def _group(bind: Bind) -> int:
    from grp import getgrnam

    group = _number_of(bind, "group", lambda name: getgrnam(name).gr_gid)
    if group not in (-1, os.getegid(), *os.getgroups()) and not _may(_CAP_CHOWN):
        raise bind.error(f"this user is not in group {bind.options['group']}: choose a group of this user")
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
    """Return whether this process has `capability`; on a system without capabilities, whether it is root's."""
    with contextlib.suppress(OSError):
        if found := re.search(r"^CapEff:\s*([0-9a-f]+)$", Path("/proc/self/status").read_text(), re.MULTILINE):
            return bool(int(found[1], 16) >> capability & 1)
    return os.geteuid() == 0


def socket_at(descriptor: int) -> socket.socket:
    """Return our own duplicate of an open socket. Raises OSError if `descriptor` is not a socket."""
    duplicate = os.dup(descriptor)
    try:
        return socket.socket(fileno=duplicate)
    except BaseException:
        os.close(duplicate)
        raise


def reason_of(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()
