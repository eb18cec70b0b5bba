"""Addresses of peers and servers: as people write them, and what of them counts as one peer. Text that peers choose."""

from __future__ import annotations

from typing import Any


def printable(text: object) -> str:
    """Text that a peer may have chosen, fit for a log, a terminal or a table: one line, of printable characters alone.

    If `str(text)` has line ends, escape sequences, controls of the direction of text, or surrogates, which can't be
    encoded, it is written as in a string literal of Python.
    """
    text = str(text)
    return text if text.isprintable() else repr(text)[1:-1]


def host_text(address: Any) -> str:
    """The host of an internet address; a Unix address whole."""
    return printable(address[0]) if isinstance(address, tuple) and address else address_text(address)


def network_of(address: Any) -> str | None:
    """What counts as one peer: an IPv4 address, an IPv6 network of 64 bits; None for those that have no address."""
    if not isinstance(address, tuple) or not address:
        return None
    host = str(address[0])
    if ":" not in host:
        return host
    from ipaddress import IPv6Address  # only those who limit peers need it

    try:
        number = IPv6Address(host.partition("%")[0])
    except ValueError:
        return host
    return str(number.ipv4_mapped or IPv6Address(int(number) >> 64 << 64))


def address_text(address: Any) -> str:
    """An address as people write it: `127.0.0.1:80`, `[::1]:80`, `/run/x.sock`, `@abstract`; `-` for an unnamed one."""
    if isinstance(address, tuple) and len(address) >= 2:
        host, port = address[:2]
        return printable(f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}")
    if isinstance(address, bytes):
        address = address.decode("utf-8", "replace")
    if not isinstance(address, str) or not address:
        return "-"
    return printable("@" + address[1:] if address[0] == "\0" else address)
