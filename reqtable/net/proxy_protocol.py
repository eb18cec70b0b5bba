"""The PROXY protocol, versions 1 and 2: a proxy names its client before the client's own first byte.

Source: HAProxy's doc/proxy-protocol.txt. Pure: bytes in, a header out. Version 1 is a line of text. Version 2 is binary
and states its length; its optional type-length-value fields are skipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from reqtable.table.errors import PeerError

_SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"  # of version 2
_FIXED_BYTES = 16
_LINE = b"PROXY "
_LINE_BYTES_MAX = 107
HEADER_BYTES_MAX = 4096  # of version 2, whose length field allows 64 KiB

_LOCAL, _PROXIED = 0x20, 0x21
_INTERNET, _INTERNET6, _UNIX = 1, 2, 3
_ADDRESS_BYTES = {_INTERNET: 12, _INTERNET6: 36, _UNIX: 216}
_UNIX_PATH_BYTES = 108


class ProxyHeaderError(PeerError):
    """A trusted proxy did not send a valid PROXY protocol header."""


@dataclass(frozen=True, slots=True)
class ProxyHeader:
    """Holds the addresses of the client's own connection, in the socket module's form; None if the proxy names none.

    A proxy names none for its own connections (health checks), nor for connections of a kind that it does not know.
    """

    source: Any = None
    destination: Any = None


def header_end(data: bytes) -> int | None:
    """Return the length of the header that begins `data`; None while it is unknown. Raises ProxyHeaderError."""
    if data.startswith(_LINE[: len(data)]):
        end = data.find(b"\r\n", 0, _LINE_BYTES_MAX)
        if end >= 0:
            return end + 2
        if len(data) >= _LINE_BYTES_MAX:
            raise ProxyHeaderError(f"a PROXY line of more than {_LINE_BYTES_MAX} bytes")
        return None
    if not data.startswith(_SIGNATURE[: len(data)]):
        raise ProxyHeaderError(f"not a PROXY header: it begins with {data[:_FIXED_BYTES]!r}")
    if len(data) < _FIXED_BYTES:
        return None
    end = _FIXED_BYTES + int.from_bytes(data[14:_FIXED_BYTES], "big")
    if end > HEADER_BYTES_MAX:
        raise ProxyHeaderError(f"a PROXY header of {end} bytes: at most {HEADER_BYTES_MAX} are allowed")
    return end


def parse(header: bytes) -> ProxyHeader:
    """Parse a complete header. Raises ProxyHeaderError."""
    return _parse_line(header) if header.startswith(_LINE) else _parse_binary(header)


def _parse_line(header: bytes) -> ProxyHeader:
    words = header[len(_LINE) : -2].decode("latin-1").split(" ")
    if words[0] == "UNKNOWN":
        return ProxyHeader()
    kinds: dict[str, type[IPv4Address | IPv6Address]] = {"TCP4": IPv4Address, "TCP6": IPv6Address}
    kind: Any = kinds.get(words[0])
    if kind is None or len(words) != 5:
        raise ProxyHeaderError(f"not a PROXY line: {header!r}")
    source, destination, *ports = words[1:]
    if "%" in source + destination:
        raise ProxyHeaderError(f"a PROXY line with an address zone, which has no meaning on this machine: {header!r}")
    try:
        return ProxyHeader(_address(kind(source), _port(ports[0])), _address(kind(destination), _port(ports[1])))
    except ValueError as error:
        raise ProxyHeaderError(f"not a PROXY line: {header!r}: {error}") from None


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 65_536):
        raise ValueError(f"{text!r} is not a port")
    return int(text)


def _parse_binary(header: bytes) -> ProxyHeader:
    command, family = header[12], header[13] >> 4
    if command == _LOCAL:
        return ProxyHeader()
    if command != _PROXIED:
        raise ProxyHeaderError(f"a PROXY header with version and command {command:#x}")
    size = _ADDRESS_BYTES.get(family)
    if size is None:
        return ProxyHeader()
    if len(header) < _FIXED_BYTES + size:
        raise ProxyHeaderError(f"a PROXY header of {len(header)} bytes is too short for its addresses")
    block = header[_FIXED_BYTES : _FIXED_BYTES + size]
    if family == _UNIX:
        return ProxyHeader(_path(block[:_UNIX_PATH_BYTES]), _path(block[_UNIX_PATH_BYTES:]))
    half = (size - 4) // 2
    return ProxyHeader(_endpoint(block[:half], block[-4:-2]), _endpoint(block[half : 2 * half], block[-2:]))


def _endpoint(host: bytes, port: bytes) -> Any:
    address = IPv4Address(host) if len(host) == 4 else IPv6Address(host)
    return _address(address, int.from_bytes(port, "big"))


def _address(host: IPv4Address | IPv6Address, port: int) -> Any:
    return (str(host), port) if host.version == 4 else (str(host), port, 0, 0)


def _path(field: bytes) -> str:
    """Return a Unix address. An abstract one begins with a NUL (unix(7))."""
    name = field.rstrip(b"\0")
    return name.decode("utf-8", "surrogateescape")
