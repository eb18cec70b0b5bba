"""The wants of HTTP: a whole head, the pieces of a body. The fields of a handler hold its half-read message."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import ClassVar

from reqtable.http.head import TOKEN, BadRequest, Fields, Head, parse_head, parse_trailers
from reqtable.table.arguments import whole_bytes
from reqtable.table.errors import LimitExceeded
from reqtable.table.input import MISSING, Missing
from reqtable.table.want import Waiting, Want, want_type

HEAD_BYTES = 65_536
TRAILER_BYTES = 8192
_END = b"\r\n\r\n"
_NO_BEGINNING = re.compile(rb"[^\r\x21-\x7e]")  # such as that of a TLS handshake
_BARE_LF = re.compile(rb"(?<!\r)\n")
# The size of a chunk, and its extensions, which say nothing to us (RFC 9112, 7.1.1).
_TOKEN = TOKEN.encode()
_QUOTED = rb'"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t \x21-\x7e\x80-\xff])*"'
_EXTENSION = rb"[ \t]*;[ \t]*%s(?:[ \t]*=[ \t]*(?:%s|%s))?" % (_TOKEN, _TOKEN, _QUOTED)
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:%s)*\r\n" % _EXTENSION)
_SIZE_LINE_BYTES = 1024


@want_type
class WholeHead(Want[Head]):
    limit: int
    needs_bytes: ClassVar[bool] = True

    def take(self, entry: Waiting) -> Head | Missing:
        unread = entry.input
        searched = unread.searched(_END)
        while True:
            try:
                data = unread.through(_END, self.limit)
            except LimitExceeded:
                is_line = b"\r\n" not in unread.peek(self.limit)
                raise BadRequest(414 if is_line else 431, f"the head exceeds {self.limit} bytes") from None
            if data is MISSING:
                self._check_begun(unread.peek(self.limit, max(0, searched - 1)), not searched)
                return MISSING
            if data != _END:
                return parse_head(data.removeprefix(b"\r\n"))
            # Empty lines before a request are ignored (RFC 9112, 2.2).

    def first(self, data: bytes) -> tuple[Head, int] | None:
        end = data.find(_END) + len(_END)
        if not len(_END) < end <= self.limit:
            return None  # `take` looks whether it can become a head
        try:
            return parse_head(data if end == len(data) else data[:end]), end
        except BadRequest:
            return None  # `take` says why, unless it is only an empty line

    @staticmethod
    def _check_begun(seen: bytes, is_beginning: bool) -> None:
        """Refuse at once what can't become a head: its client may wait for the answer instead of sending more."""
        bare = _BARE_LF.search(seen, 0 if is_beginning else 1)
        if bare is not None:
            raise BadRequest(400, "a line that ends with a bare LF")
        if is_beginning and _NO_BEGINNING.match(seen):
            parse_head(seen)  # says why

    def __repr__(self) -> str:
        return f"head({self.limit})"


@want_type
class ChunkSize(Want[int]):
    """Waits for the line with the size of the next chunk."""

    needs_bytes: ClassVar[bool] = True

    def take(self, entry: Waiting) -> int | Missing:
        seen = entry.input.peek(_SIZE_LINE_BYTES)
        end = seen.find(b"\n")
        if end < 0:
            if len(seen) >= _SIZE_LINE_BYTES or re.match(rb"[0-9A-Fa-f]", seen) is None:
                raise _why_no_size(seen)
            return MISSING
        found = _SIZE.fullmatch(seen, 0, end + 1)
        if found is None:
            raise _why_no_size(seen)
        entry.input.exactly(end + 1)
        return int(found[1], 16)

    def __repr__(self) -> str:
        return "chunk_size()"


@want_type
class ChunkEnd(Want[None]):
    """Waits for the end of line after a chunk."""

    needs_bytes: ClassVar[bool] = True

    def take(self, entry: Waiting) -> Missing | None:
        seen = entry.input.peek(2)
        if seen == b"\r\n":
            entry.input.exactly(2)
            return None
        if not b"\r\n".startswith(seen):
            raise BadRequest(400, "a chunk is longer than its size")
        return MISSING

    def __repr__(self) -> str:
        return "chunk_end()"


@want_type
class Trailers(Want[Fields]):
    """Waits for the fields after the last chunk."""

    limit: int
    needs_bytes: ClassVar[bool] = True

    def take(self, entry: Waiting) -> Fields | Missing:
        seen = entry.input.peek(self.limit)
        end = 0 if seen[:2] == b"\r\n" else seen.find(_END) + 2
        bare = _BARE_LF.search(seen, 0, end if end != 1 else len(seen))
        if bare is not None:
            raise BadRequest(400, "a line that ends with a bare LF")
        if end == 1:
            if len(seen) >= self.limit:
                raise BadRequest(431, f"the trailers exceed {self.limit} bytes")
            return MISSING
        data = entry.input.exactly(end + 2)
        assert data is not MISSING
        return parse_trailers(data)

    def __repr__(self) -> str:
        return f"trailers({self.limit})"


def _why_no_size(seen: bytes) -> BadRequest:
    if re.match(rb"[0-9A-Fa-f]{1,16}[ \t]*;", seen):
        return BadRequest(400, "the extension of a chunk is not well-formed")
    return BadRequest(400, "the size of a chunk is not a hexadecimal number")


@lru_cache(maxsize=64)
def head(limit: int = HEAD_BYTES) -> Want[Head]:
    """Wait for the head of a request (RFC 9112, 2.1), at most `limit` bytes. The item is a `Head`.

    The handler gets BadRequest if the head is too long or not well-formed. Raises TypeError or ValueError for a limit
    that is not a whole number of 64 or more.
    """
    return WholeHead(whole_bytes("limit", limit, 64))


CHUNK_SIZE = ChunkSize()
CHUNK_END = ChunkEnd()
TRAILERS = Trailers(TRAILER_BYTES)
