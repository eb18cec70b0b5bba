"""Addresses of peers and servers: as people write them, and what of them counts as one peer."""

from __future__ import annotations

from typing import Any


def host_text(address: Any) -> str:
    """The host of an internet address; a Unix address whole."""
    return str(address[0]) if isinstance(address, tuple) and address else address_text(address)


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
        return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"
    if isinstance(address, bytes):
        address = address.decode("utf-8", "replace")
    if not isinstance(address, str) or not address:
        return "-"
    shown = "@" + address[1:] if address[0] == "\0" else address
    # A Unix peer chooses its own name: it shall not write lines of its own into a listing or a log.
    return shown if shown.isprintable() else repr(shown)[1:-1]
