"""The head of an HTTP/1.1 request: its request line, its header fields, and how its body is framed (RFC 9110, 9112).

A head is parsed in one go, once it is whole. It is strict where leniency lets two servers read the same bytes
differently: one Content-Length, none beside Transfer-Encoding, no line that ends with a bare LF, no folded field, no
white space before a colon. A refused head raises a `BadRequest`, which has the status of the answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from reqtable.http.known import Known
from reqtable.table.errors import PeerError

Fields = tuple[tuple[str, str], ...]  # names in lower case, and values, in their order

FIELDS_MAX = 100
LINE_BYTES_MAX = 8190  # of one field with its end of line, and of the request line

# tchar of RFC 9110, 5.6.2
TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_METHOD = r"[A-Z][A-Z0-9!#$%&'*+\-.^_|~]*"
_LINE = re.compile(rf"({_METHOD}) ([\x21-\x7e]+) HTTP/1\.([01])\r\n")
# One whole line: a name, and a value without control characters (RFC 9110, 5.5). White space after a value is cut off
# later, because a pattern that leaves it out is three times as slow.
_FIELD = re.compile(rf"^({TOKEN}):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)\r\n", re.MULTILINE)
_DIGITS = re.compile(r"[0-9]{1,18}")
_HOST = re.compile(
    r"(?:[0-9A-Za-z._~!$&'()*+,;=-]*(?:%[0-9A-Fa-f]{2}[0-9A-Za-z._~!$&'()*+,;=-]*)*"
    r"|\[[0-9A-Fa-f:.]+(?:%25[0-9A-Za-z._~-]+)?\])(?::[0-9]*)?"
)
# What comes again and again: the names of fields in lower case, and whether a text is a host.
_NAMES: Known[str, str] = Known(str.lower, 1024)
_HOSTS: Known[str, bool] = Known(lambda host: _HOST.fullmatch(host) is not None, 256)
_AUTHORITY = re.compile(r"https?://([^/?]+)", re.IGNORECASE)
# The fields that say where a message ends, or how it is read: one of each (RFC 9112, 3.2 and 6.3).
_ONCE = ("host", "content-length", "transfer-encoding", "content-type")
# With a hyphen in place of the underscore, these frame a message; as variables of CGI the two are the same.
_FRAMING_LIKE = ("content_length", "transfer_encoding")
_NOT_TRAILING = {*_ONCE, "trailer", "authorization", "cookie", "expect"}  # RFC 9110, 6.5.1


class BadRequest(PeerError):
    """A request that can't be served as it is. `status` is that of the answer."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"{status}: {reason}")
        self.status = status
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.status, self.reason)


@dataclass(slots=True, unsafe_hash=True)  # not frozen: a frozen one takes three times as long to make
class Head:
    """Holds the head of a request (RFC 9112). It is plain data, which never changes."""

    method: str
    target: str  # the target of the request line, as it was sent
    version: tuple[int, int]
    fields: Fields
    content_length: int | None  # bytes of the body; None: there is no body, or it comes in chunks
    is_chunked: bool
    keep_alive: bool  # true: the client can send another request on this connection
    expects_continue: bool  # true: the client waits for 100 before it sends the body
    upgrade: str | None  # the protocol of the field Upgrade, in lower case

    @property
    def path(self) -> str:
        """The path, still with its escapes; "*" for `OPTIONS *`."""
        return _origin_form(self.target).partition("?")[0]

    @property
    def query(self) -> str:
        """The text after the first "?", or ""."""
        return _origin_form(self.target).partition("?")[2]

    def get(self, name: str, default: str | None = None) -> str | None:
        """Return the value of a field; several are joined by ", ". `name` is in lower case.

        "host" is that of the target, if the target is a whole URI.
        """
        found = [value for each, value in self.fields if each == name]
        return ", ".join(found) if found else default

    @property
    def has_body(self) -> bool:
        """Whether a body follows."""
        return self.is_chunked or bool(self.content_length)

    @property
    def origin_form(self) -> str:
        """The target without a scheme and an authority (RFC 9112, 3.2.2)."""
        return _origin_form(self.target)


def _origin_form(target: str) -> str:
    if target[0] in "/*" or "://" not in target:
        return target
    rest = target.partition("://")[2]
    slash, mark = rest.find("/"), rest.find("?")
    if slash < 0 or 0 <= mark < slash:
        return "/" + ("" if mark < 0 else rest[mark:])
    return rest[slash:]


def parse_head(data: bytes) -> Head:
    """Parse a head, which ends with its only empty line. Raises BadRequest."""
    text = data.decode("latin-1")
    line = _LINE.match(text)
    if line is None:
        raise _why_no_request_line(data)
    method, target, _ = line.groups()
    authority = _authority_of(method, target) if target[0] != "/" or "#" in target else None
    version, fields, host, length, is_chunked, keep_alive, expects, upgrade = _BLOCKS[text[line.start(3) :]]
    if len(text) > LINE_BYTES_MAX:
        _check_lengths(text)
    if authority is not None:  # it is the host, whatever the field says (RFC 9112, 3.2.2)
        host = authority
        fields = (("host", authority), *[each for each in fields if each[0] != "host"])
    if host is None:
        if version == (1, 1):
            raise BadRequest(400, "HTTP/1.1 without a Host")
    elif not _HOSTS[host]:
        raise BadRequest(400, "the Host is no host")
    return Head(method, target, version, fields, length, is_chunked, keep_alive, expects, upgrade)


def parse_trailers(data: bytes) -> Fields:
    """Parse the fields after a chunked body, which end with an empty line. Raises BadRequest."""
    text = data.decode("latin-1")
    fields = _fields(text, 0)
    if len(text) > LINE_BYTES_MAX:
        _check_lengths(text)
    for name, _ in fields:
        if name in _NOT_TRAILING:
            raise BadRequest(400, f"{name} after the body")
    return fields


def _fields(text: str, start: int) -> Fields:
    """Return the fields in the lines from `start` on. The last line is the empty one."""
    found = _FIELD.findall(text, start)
    # A match is a whole line. So if there are as many as lines, no line has been passed over.
    if len(found) != text.count("\n", start) - 1 or not text.endswith("\r\n"):
        raise _why_no_field(text, start)
    if len(found) > FIELDS_MAX:
        raise BadRequest(431, f"more than {FIELDS_MAX} header fields")
    return tuple([(_NAMES[name], value.rstrip(" \t")) for name, value in found])


def _check_lengths(text: str) -> None:
    first, *others = text.split("\r\n")
    if len(first) + 2 > LINE_BYTES_MAX:
        raise BadRequest(414, f"the request line exceeds {LINE_BYTES_MAX} bytes")
    if max(map(len, others)) + 2 > LINE_BYTES_MAX:
        raise BadRequest(431, f"a header field exceeds {LINE_BYTES_MAX} bytes")


def _joined(fields: Fields) -> dict[str, str]:
    """Return the fields by their names, the values of several joined. Raises BadRequest if there must be only one."""
    found: dict[str, str] = {}
    for name, value in fields:
        if name not in found:
            found[name] = value
        elif name in _ONCE:
            raise BadRequest(400, f"more than one {name}")
        else:
            found[name] += ", " + value
    return found


def _authority_of(method: str, target: str) -> str | None:
    """Return the authority of a target that is no path, or None: it has none. Raises BadRequest (RFC 9112, 3.2)."""
    if method == "CONNECT":
        raise BadRequest(501, "CONNECT is for proxies")
    if "#" in target:
        raise BadRequest(400, "a fragment in the target")
    if target == "*" and method == "OPTIONS":
        return None
    found = _AUTHORITY.match(target)
    if found is None:
        raise BadRequest(400, "the target is neither a path nor a whole URI")
    return found[1]


def _block(text: str) -> tuple[tuple[int, int], Fields, str | None, int | None, bool, bool, bool, str | None]:
    """Parse the end of a request line, its minor version, and the fields after it.

    Returns what `Head` has of them, with the Host beside the fields.
    """
    is_1_1 = text[0] == "1"
    fields = _fields(text, 3)
    found = dict(fields)
    if len(found) < len(fields):
        found = _joined(fields)
    length, is_chunked = None, False
    if "content-length" in found or "transfer-encoding" in found:
        length, is_chunked = _framing(found, is_1_1)
    if "_" in text and any(name in found for name in _FRAMING_LIKE):
        raise BadRequest(400, "a field whose name is like one that frames the message")
    keep_alive, upgrade = is_1_1, None
    if "connection" in found:
        options = {each.strip(" \t").lower() for each in found["connection"].split(",")}
        keep_alive = "close" not in options and (is_1_1 or "keep-alive" in options)
        if "upgrade" in options and "upgrade" in found and is_1_1:
            upgrade = found["upgrade"].lower()
    expects = "expect" in found and _expects(found["expect"], is_1_1)
    version = (1, 1) if is_1_1 else (1, 0)
    return version, fields, found.get("host"), length, is_chunked, keep_alive, expects, upgrade


def _has_no_secret(block: tuple[object, Fields, *tuple[object, ...]]) -> bool:
    return _SECRETS.isdisjoint([name for name, _ in block[1]])


_SECRETS = frozenset({"authorization", "cookie", "proxy-authorization"})  # they don't outlive their request
# A client sends the same fields with each of its requests, so these are mostly known. They are at most 256 KiB.
_BLOCKS = Known(_block, 256, 1024, _has_no_secret)


def _framing(found: dict[str, str], is_1_1: bool) -> tuple[int | None, bool]:
    """Return the length of the body, and whether it comes in chunks (RFC 9112, 6.3)."""
    coding, length = found.get("transfer-encoding"), found.get("content-length")
    if coding is not None:
        if length is not None:
            raise BadRequest(400, "Content-Length beside Transfer-Encoding")
        if not is_1_1:
            raise BadRequest(400, "Transfer-Encoding in HTTP/1.0")
        if coding.lower() != "chunked":
            codings = [each.strip(" \t") for each in coding.lower().split(",")]
            if codings[-1] != "chunked" or codings.count("chunked") > 1:
                raise BadRequest(400, "a Transfer-Encoding that does not say where the body ends")
            raise BadRequest(501, "a Transfer-Encoding that is not chunked")
        return None, True
    if length is None:
        return None, False
    if _DIGITS.fullmatch(length) is None:
        raise BadRequest(400, "the Content-Length is not a number")
    return int(length), False


def _expects(expect: str, is_1_1: bool) -> bool:
    if expect.lower() != "100-continue":
        raise BadRequest(417, "an expectation that is not 100-continue")
    return is_1_1


def _why_no_request_line(data: bytes) -> BadRequest:
    line = data.partition(b"\n")[0]
    found = re.fullmatch(rb"(\S+) (\S+) HTTP/([0-9]+)\.([0-9]+)\r", line)
    if found is None:
        if data.startswith(b"\x16\x03"):
            return BadRequest(400, "this is TLS, but the port speaks plain HTTP")
        if b"\n" in data and not line.endswith(b"\r"):
            return BadRequest(400, "a line that ends with a bare LF")
        return BadRequest(400, "the first line is no request line: METHOD target HTTP/1.1")
    if found[3] != b"1" or found[4] not in (b"0", b"1"):
        return BadRequest(505, "only HTTP/1.0 and HTTP/1.1 are spoken here")
    if re.fullmatch(_METHOD.encode(), found[1]) is None:
        return BadRequest(400, "the method is not in capital letters")
    return BadRequest(400, "the target has other characters than visible ASCII")


def _why_no_field(text: str, start: int) -> BadRequest:
    """Say what is wrong with the first line that is no field."""
    for line in text[start:].split("\n"):
        if _FIELD.fullmatch(line + "\n"):
            continue
        name, colon, _ = line.partition(":")
        if not line.endswith("\r"):
            return BadRequest(400, "a line that ends with a bare LF")
        if line[0] in " \t":
            return BadRequest(400, "a header field that goes on in a second line")
        if not colon:
            return BadRequest(400, "a header field without a colon")
        if re.fullmatch(TOKEN, name) is None:
            return BadRequest(400, "the name of a header field has other characters than RFC 9110 allows")
        break
    return BadRequest(400, "the value of a header field has control characters")
