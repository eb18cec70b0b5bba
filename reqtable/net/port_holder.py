"""Names the process that has a port, for the error of a bind that has failed. Only Linux tells (proc(5))."""

from __future__ import annotations

import os
import re
import socket
import sys
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

from reqtable.table.addresses import printable

_TABLES: dict[int, str] = {socket.SOCK_STREAM: "tcp", socket.SOCK_DGRAM: "udp"}  # of IPv4; those of IPv6 end with a 6
_LISTENS = "0A"  # TCP_LISTEN, in the column `st`
_LINK = re.compile(r"socket:\[(\d+)\]")
_IP = IPv4Address | IPv6Address


def mend_of_use(kind: int, address: Any) -> str:
    """Return what follows `address already in use` in an error: the process that uses the address, and the mend.

    `kind` is SOCK_STREAM or SOCK_DGRAM. No process is named for a Unix socket, nor another user's unless this is root.
    """
    if isinstance(address, tuple):
        with suppress(OSError, ValueError):
            pid = min(_processes_with(_inodes_at(kind, *address[:2])), default=None)
            if pid == os.getpid():
                return " by this process itself: choose another one"
            if pid is not None:
                name = printable(Path(f"/proc/{pid}/comm").read_text().rstrip())
                return f" by {name} (process {pid}): stop it, or choose another one"
    return ": stop what uses it, or choose another one"


def _inodes_at(kind: int, host: str, port: int) -> set[str]:
    """Return the inodes of the sockets with which a bind collides: those that listen, if any does.

    A socket of the other family counts only if there is none of the same family: not all at "::" take IPv4 addresses.
    """
    families = ("6", "") if ":" in host else ("", "6")
    packed = socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host.partition("%")[0])
    for family in families:
        found: dict[str, str] = {}
        with suppress(FileNotFoundError):  # this kernel has no IPv6
            for line in Path(f"/proc/net/{_TABLES[kind]}{family}").read_text().splitlines()[1:]:
                _, local, _, state, _, _, _, _, _, inode, *_ = line.split()
                its_host, _, its_port = local.partition(":")
                if int(its_port, 16) == port and _collide(_ip_of(_unpacked(its_host)), _ip_of(packed)):
                    found[inode] = state
        if found:
            return {inode for inode, state in found.items() if state == _LISTENS} or set(found)
    return set()


def _processes_with(inodes: set[str]) -> list[int]:
    """Return the processes that have one of these sockets open, as far as this user may look."""
    return [int(name) for name in os.listdir("/proc") if inodes and name.isdecimal() and _has_one(name, inodes)]


def _has_one(pid: str, inodes: set[str]) -> bool:
    folder = f"/proc/{pid}/fd"
    with suppress(OSError):  # the process has ended, or is another user's
        for each in os.listdir(folder):
            with suppress(OSError):  # it was closed meanwhile
                link = _LINK.fullmatch(os.readlink(f"{folder}/{each}"))
                if link is not None and link[1] in inodes:
                    return True
    return False


def _collide(one: _IP, other: _IP) -> bool:
    """Return whether sockets at two addresses can't both have a port. "::" takes every IPv4 address, too."""
    return one == other or any(
        each.is_unspecified and another.version <= each.version for each, another in ((one, other), (other, one))
    )


def _unpacked(text: str) -> bytes:
    """Return an address as bytes. The kernel writes numbers of 32 bits, each in the byte order of this machine."""
    numbers = [int(text[place : place + 8], 16) for place in range(0, len(text), 8)]
    return b"".join(each.to_bytes(4, sys.byteorder) for each in numbers)


def _ip_of(packed: bytes) -> _IP:
    """Return an address; the IPv4 address itself if it is written as an IPv6 address."""
    if len(packed) == 4:
        return IPv4Address(packed)
    address = IPv6Address(packed)
    return address.ipv4_mapped or address
