"""The head of an HTTP/1.1 request: its request line, its header fields, and how its body is framed (RFC 9110, 9112).

A head is parsed in one go, once it is whole. It is strict where leniency lets two servers read the same bytes
differently: one Content-Length, none beside Transfer-Encoding, no line that ends with a bare LF, no folded field, no
white space before a colon. What is refused is a `BadRequest`, which has the status of the answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from reqtable.table.errors import PeerError

Fields = tuple[tuple[str, str], ...]  # names in lower case, and values, in their order

FIELDS_MAX = 100
LINE_BYTES_MAX = 8190  # of one field with its end of line, and of the request line

# tchar of RFC 9110, 5.6.2
_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_LINE = re.compile(rb"(%s) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])\r\n" % _TOKEN)
# A field value: visible characters, obs-text, and in between spaces and tabs (RFC 9110, 5.5).
_FIELD = re.compile(rb"(%s):[ \t]*((?:[\x21-\x7e\x80-\xff](?:[ \t]*[\x21-\x7e\x80-\xff])*)?)[ \t]*\r\n" % _TOKEN)
_DIGITS = re.compile(r"[0-9]{1,18}")
_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+(?:%25[0-9A-Za-z._~-]+)?\]|[0-9A-Za-z._~%!$&'()*+,;=-]*)(?::[0-9]*)?")
_METHODS = re.compile(rb"[A-Z][A-Z0-9!#$%&'*+\-.^_|~]*")
# The fields that say where a message ends, or which message this is: one of each (RFC 9112, 3.2 and 6.3).
_ONCE = ("host", "content-length", "transfer-encoding", "content-type", "expect")
# A name with an underscore is another name with a hyphen once it is a variable of CGI.
_FRAMING_LIKE = {"content_length", "transfer_encoding", "host_"}


class BadRequest(PeerError):
    """A request that can't be served as it is. `status` is that of the answer."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"{status}: {reason}")
        self.status = status
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.status, self.reason)


@dataclass(frozen=True, slots=True)
class Head:
    """Holds the head of a request. It is plain data."""

    method: str
    target: str  # as it was sent
    version: tuple[int, int]
    fields: Fields
    content_length: int | None  # bytes of the body; None: there is no body, or it comes in chunks
    is_chunked: bool
    keep_alive: bool  # the client can send another request on this connection
    expects_continue: bool  # the client waits for 100 before it sends the body
    upgrade: str | None  # what the client would like to speak instead, in lower case

    @property
    def path(self) -> str:
        """The path, still with its escapes; "*" of OPTIONS."""
        return self._origin_form().partition("?")[0]

    @property
    def query(self) -> str:
        """What follows the first "?", or ""."""
        return self._origin_form().partition("?")[2]

    def get(self, name: str, default: str | None = None) -> str | None:
        """Return the value of a field; several are joined by ", ". `name` is in lower case."""
        found = [value for each, value in self.fields if each == name]
        return ", ".join(found) if found else default

    @property
    def has_body(self) -> bool:
        """Whether a body follows."""
        return self.is_chunked or bool(self.content_length)

    def _origin_form(self) -> str:
        """Return the target without a scheme and an authority (RFC 9112, 3.2.2)."""
        if self.target[0] in "/*" or "://" not in self.target:
            return self.target
        rest = self.target.partition("://")[2]
        slash, mark = rest.find("/"), rest.find("?")
        if slash < 0 or 0 <= mark < slash:
            return "/" + ("" if mark < 0 else rest[mark:])
        return rest[slash:]


def parse_head(data: bytes) -> Head:
    """Parse a head, which ends with an empty line. Raises BadRequest."""
    line = _LINE.match(data)
    if line is None:
        raise _why_no_request_line(data)
    if line.end() > LINE_BYTES_MAX:
        raise BadRequest(414, f"the request line exceeds {LINE_BYTES_MAX} bytes")
    method, target, major, minor = line.groups()
    if not _METHODS.fullmatch(method):
        raise BadRequest(400, f"the method {method!r} is not in capital letters")
    version = int(major), int(minor)
    if version not in ((1, 0), (1, 1)):
        raise BadRequest(505, "only HTTP/1.0 and HTTP/1.1 are spoken here")
    fields = _fields(data, line.end())
    found: dict[str, str] = {}
    for name, value in fields:
        if name in _ONCE and name in found:
            raise BadRequest(400, f"more than one {name}")
        found[name] = value
    if not _FRAMING_LIKE.isdisjoint(found):
        raise BadRequest(400, "a field whose name is like one that frames the message")
    text = target.decode("ascii")
    _check_target(method, text)
    _check_host(found.get("host"), version)
    length, is_chunked = _framing(found, version)
    options = {each.strip().lower() for name, value in fields if name == "connection" for each in value.split(",")}
    keep_alive = "close" not in options and (version == (1, 1) or "keep-alive" in options)
    expects = _expects(found.get("expect"), version)
    upgrade = found.get("upgrade") if "upgrade" in options and version == (1, 1) else None
    return Head(
        method.decode("ascii"),
        text,
        version,
        fields,
        length,
        is_chunked,
        keep_alive,
        expects,
        None if upgrade is None else upgrade.lower(),
    )


def parse_trailers(data: bytes) -> Fields:
    """Parse the fields after a chunked body, which end with an empty line. Raises BadRequest."""
    fields = _fields(data, 0)
    for name, _ in fields:
        if name in _ONCE or name in ("trailer", "authorization", "cookie"):  # RFC 9110, 6.5.1
            raise BadRequest(400, f"{name} after the body")
    return fields


def _fields(data: bytes, start: int) -> Fields:
    fields: list[tuple[str, str]] = []
    match = _FIELD.match
    while data[start : start + 2] != b"\r\n":
        found = match(data, start)
        if found is None:
            raise _why_no_field(data, start)
        if len(fields) >= FIELDS_MAX:
            raise BadRequest(431, f"more than {FIELDS_MAX} header fields")
        if found.end() - start > LINE_BYTES_MAX:
            raise BadRequest(431, f"a header field exceeds {LINE_BYTES_MAX} bytes")
        fields.append((found[1].decode("ascii").lower(), found[2].decode("latin-1")))
        start = found.end()
    if start + 2 != len(data):
        raise BadRequest(400, "more than a head")
    return tuple(fields)


def _check_target(method: bytes, target: str) -> None:
    """Check the form of the target (RFC 9112, 3.2)."""
    if method == b"CONNECT":
        raise BadRequest(501, "CONNECT is for proxies")
    if target[0] == "/" or (target == "*" and method == b"OPTIONS"):
        if "#" in target:
            raise BadRequest(400, "a fragment in the target")
        return
    if re.match(r"https?://[^/?#]", target, re.IGNORECASE) is None or "#" in target:
        raise BadRequest(400, "the target is neither a path nor a whole URI")


def _check_host(host: str | None, version: tuple[int, int]) -> None:
    if host is None:
        if version == (1, 1):
            raise BadRequest(400, "HTTP/1.1 without a Host")
    elif _HOST.fullmatch(host) is None:
        raise BadRequest(400, "the Host is no host")


def _framing(found: dict[str, str], version: tuple[int, int]) -> tuple[int | None, bool]:
    """Return the length of the body, and whether it comes in chunks (RFC 9112, 6.3)."""
    coding, length = found.get("transfer-encoding"), found.get("content-length")
    if coding is not None:
        if length is not None:
            raise BadRequest(400, "Content-Length beside Transfer-Encoding")
        if version == (1, 0):
            raise BadRequest(400, "Transfer-Encoding in HTTP/1.0")
        if coding.lower() != "chunked":
            raise BadRequest(501, "a Transfer-Encoding that is not chunked")
        return None, True
    if length is None:
        return None, False
    if _DIGITS.fullmatch(length) is None:
        raise BadRequest(400, "the Content-Length is not a number")
    return int(length), False


def _expects(expect: str | None, version: tuple[int, int]) -> bool:
    if expect is None:
        return False
    if expect.lower() != "100-continue":
        raise BadRequest(417, "an expectation that is not 100-continue")
    return version == (1, 1)


def _why_no_request_line(data: bytes) -> BadRequest:
    line = data.partition(b"\r\n")[0]
    if re.search(rb" HTTP/[0-9]+\.[0-9]+$", line) and line.count(b" ") == 2 and not re.search(rb"[^\x20-\x7e]", line):
        version = line.rpartition(b"/")[2]
        if re.fullmatch(rb"[0-9]\.[0-9]", version) is None:
            return BadRequest(505, "no such version of HTTP")
    return BadRequest(400, "the first line is no request line: METHOD target HTTP/1.1")


def _why_no_field(data: bytes, start: int) -> BadRequest:
    line = data[start:].partition(b"\r\n")[0]
    name = line.partition(b":")[0]
    if line[:1] in (b" ", b"\t"):
        return BadRequest(400, "a header field that goes on in a second line")
    if b":" not in line:
        return BadRequest(400, "a header field without a colon")
    if re.fullmatch(_TOKEN, name) is None:
        return BadRequest(400, "the name of a header field has other characters than RFC 9110 allows")
    return BadRequest(400, "the value of a header field has control characters")
