"""Addresses of peers and servers as text, the networks they belong to, and safe printing of text from peers."""

from __future__ import annotations

from typing import Any

_OCTETS = {str(number): number for number in range(256)}


class _Number:
    """Holds an address that is a number already: a program's own `get_request` may return anything."""

    __slots__ = ("address",)

    def __init__(self, address: int) -> None:
        self.address = address


def packed(address: Any) -> Any:
    """Return the address of an IPv4 peer as one number, which takes a fifth of the memory, or any other as it is."""
    if type(address) is tuple and len(address) == 2:
        host, port = address
        if type(host) is str and type(port) is int and 0 <= port < 65_536:
            try:
                a, b, c, d = map(_OCTETS.__getitem__, host.split("."))
            except (KeyError, ValueError):  # another kind of address, or written in another way, such as 127.1
                return address
            return (a << 24 | b << 16 | c << 8 | d) << 16 | port
    return _Number(address) if type(address) is int else address


def unpacked(address: Any) -> Any:
    """Return the address that was packed."""
    if type(address) is int:
        host, port = address >> 16, address & 65_535
        return f"{host >> 24}.{host >> 16 & 255}.{host >> 8 & 255}.{host & 255}", port
    return address.address if type(address) is _Number else address


def printable(text: object) -> str:
    """Return text that a peer may have chosen as one line of printable characters, for a log, a terminal or a table.

    If `str(text)` has line ends, escape sequences, text-direction controls, or surrogates (which can't be encoded), it
    is written as in a Python string literal.
    """
    text = str(text)
    return text if text.isprintable() else repr(text)[1:-1]


def host_text(address: Any) -> str:
    """Return the host of an internet address, or the whole of a Unix address."""
    return printable(address[0]) if isinstance(address, tuple) and address else address_text(address)


def network_of(address: Any) -> str | None:
    """Return what counts as one peer: an IPv4 address, or a /64 network of IPv6. None for any other address."""
    if not isinstance(address, tuple) or not address:
        return None
    host = str(address[0])
    if ":" not in host:
        return host
    from ipaddress import IPv6Address  # imported here: only `entries_per_peer_max` needs it

    try:
        number = IPv6Address(host.partition("%")[0])
    except ValueError:
        return host
    return str(number.ipv4_mapped or IPv6Address(int(number) >> 64 << 64))


def address_text(address: Any) -> str:
    """Return an address as text: `127.0.0.1:80`, `[::1]:80`, `/run/x.sock`, `@abstract`, or `-` if it has no name."""
    if isinstance(address, tuple) and len(address) >= 2:
        host, port = address[:2]
        return printable(f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}")
    if isinstance(address, bytes):
        address = address.decode("utf-8", "replace")
    if not isinstance(address, str) or not address:
        return "-"
    return printable("@" + address[1:] if address[0] == "\0" else address)
