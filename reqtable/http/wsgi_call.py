"""One call of a WSGI application (PEP 3333): what it is given, what it answers, and what it may not answer.

A call does no I/O, so it can run in any thread, or in several in turn: it has a context of its own (contextvars). It
puts the pieces of its answer into a queue, and stops when the queue holds as much as the connection may have unsent.
Whoever sends the pieces has it go on later.
"""

from __future__ import annotations

import logging
import os
import re
import select
import socket
import stat
from collections import deque
from collections.abc import Callable, Iterator
from contextvars import Context, copy_context
from typing import Any, ClassVar

from reqtable.http.answer import NO_BODY
from reqtable.http.known import Known
from reqtable.table.errors import HandlerError
from reqtable.table.places import place_of
from reqtable.table.states import Event
from reqtable.table.tracebacks import account_of, trim
from reqtable.table.want import want_type
from reqtable.table.wants import Posted

log = logging.getLogger("reqtable.http")

WRITTEN_BYTES_MAX = 64 * 2**20  # what `write()` may leave untaken
PIECE_BYTES = 262_144  # the most that is put into the output at once
_BLOCK_BYTES = 65_536

_STATUS = re.compile(r"([2-9][0-9][0-9])(?: [\t\x20-\x7e\x80-\xff]*)?")
_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_DIGITS = re.compile(r"[0-9]{1,18}")
# The fields that say how this connection carries the answer: the server's business (PEP 3333, "Other HTTP Features").
_HOP_BY_HOP = {
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}


@want_type
class Outcome(Posted[None]):
    """Waits until the application, which runs elsewhere, has sent something or has returned."""

    awaits: ClassVar[Event] = Event.AWAITS_RESULT

    def __repr__(self) -> str:
        return "application()"


OUTCOME = Outcome()


class FileWrapper:
    """Iterates over a file in blocks. If an application returns one of a plain file, the kernel copies the file."""

    def __init__(self, file: Any, block_bytes: int = _BLOCK_BYTES) -> None:
        self.file = file
        self.block_bytes = block_bytes

    def __iter__(self) -> Iterator[bytes]:
        while data := self.file.read(self.block_bytes):
            yield data

    def close(self) -> None:
        close = getattr(self.file, "close", None)
        if close is not None:
            close()

    def rest(self) -> tuple[int, int] | None:
        """Return the offset of the file and how many bytes follow; None if the file is not a plain one."""
        try:
            status = os.fstat(self.file.fileno())
            offset = self.file.tell()
        except Exception:  # whatever the application's object raises
            return None
        return (offset, max(0, status.st_size - offset)) if stat.S_ISREG(status.st_mode) else None


class Client:
    """Knows whether the client that waits for an answer is still there.

    A connection has one. It is no part of a call: the application's `environ` refers to it, and the call to the
    `environ`, so a call that is done would wait for the garbage collector.
    """

    __slots__ = ("_request", "is_gone")

    def __init__(self, request: Any) -> None:
        self._request = request
        self.is_gone = False  # nobody takes the answer any more

    def disconnected(self) -> bool:
        """Return whether the client has gone, or has ended its side of the connection. Callable from any thread.

        `environ["reqtable.disconnected"]` is this method. A client that ends its side may still read: it is a hint.
        """
        descriptor = -1 if self.is_gone or not isinstance(self._request, socket.socket) else self._request.fileno()
        if descriptor < 0:
            return self.is_gone
        poll = select.poll()
        poll.register(descriptor, getattr(select, "POLLRDHUP", 0))
        return bool(poll.poll(0)) or self.is_gone


class ApplicationCall:
    """Runs an application for one request, and collects its answer."""

    # Defaults in the class: most calls set few of these.
    on_piece: Callable[[ApplicationCall], Any] | None = None  # called in the thread of the call, when a piece has come
    produced = 0  # bytes put into `pieces`
    taken = 0  # bytes taken out of `pieces`
    signalled = False  # `on_piece` was called, and nobody has looked since
    file: tuple[Any, int, int] | None = None  # a file, the offset and the number of bytes to send of it
    status = 0  # 0: start_response() was not called yet
    head = ""  # the status line and the fields, as they are sent
    length: int | None = None  # the Content-Length
    has_body = True
    said: tuple[str, ...] = ()  # what the fields say beside the length: "date", "server", "close"
    has_begun = False
    is_committed = False  # the head can't change any more
    is_whole = False  # all of the body is in `pieces` when the head is sent
    unsent_bytes: int | None = None  # how long the body would be that HEAD does not send; None: not known
    is_done = False
    is_closed = False  # `close()` of the iterable was called, or there is none
    is_out = False  # it runs in another thread
    error: BaseException | None = None
    _context: Context | None = None  # in which the application runs, whichever thread or greenlet it runs in
    _iterator: Iterator[Any] | None = None
    _close: Callable[[], Any] | None = None
    _left: int | None = None  # bytes of the body that may follow; None: as many as come

    def __init__(self, application: Any, environ: dict[str, Any], is_head: bool, client: Client) -> None:
        self._application = application
        self._environ = environ
        self._is_head = is_head
        self.client = client
        self.pieces: deque[Any] = deque()

    @property
    def what(self) -> str:
        """The request, for the log."""
        names = ("reqtable.request_id", "REMOTE_ADDR", "REQUEST_METHOD", "REQUEST_URI")
        return " ".join(str(self._environ.get(name, "-")) for name in names)

    # -- for whoever runs it ------------------------------------------------------------------------------------------

    def advance(self, bytes_max: int, one_piece: bool) -> None:
        """Run until `bytes_max` bytes wait to be taken, or with `one_piece` until there is one, or to the end."""
        if self._context is None:
            self._context = copy_context()
        self._context.run(self._advance, bytes_max, one_piece)

    def close(self) -> None:
        """Call the iterable's `close()`, once. Log an exception that it raises."""
        if self._context is not None:  # else the application has not begun
            self._context.run(self._close_iterable)

    # -- for the application ------------------------------------------------------------------------------------------

    def start_response(self, status: Any, headers: Any, exc_info: Any = None) -> Callable[[bytes], None]:
        """Take the status and the fields. Raises HandlerError if they can't be sent."""
        if exc_info is not None:
            try:
                if self.is_committed:
                    raise exc_info[1].with_traceback(exc_info[2])
            finally:
                exc_info = None  # breaks the cycle of the traceback with this frame
        elif self.status:
            raise HandlerError("start_response() was called twice: pass exc_info to replace the first answer")
        number, line = _STATUS_LINES[status]
        self._take_fields(number, headers, line)
        self.status = number
        return self._write

    def _take_fields(self, status: int, headers: Any, line: str) -> None:
        if type(headers) is not list:
            raise HandlerError(f"the headers of start_response() are a list of pairs, not {type(headers).__name__}")
        length = None
        said: tuple[str, ...] = ()
        for each, watched in map(_FIELDS.__getitem__, headers):
            if watched is None:
                line += each
            elif isinstance(watched, int):
                if length is not None:
                    raise HandlerError("more than one Content-Length")
                length = watched
                if status != 204:  # RFC 9110, 8.6
                    line += each
            else:
                said += (watched,)
                line += each
        self.head = line
        self.length = length
        self.said = said
        self.has_body = status not in NO_BODY
        self._left = length if self.has_body else 0

    def _write(self, data: bytes) -> None:
        """Take a piece of the body: what `start_response` returns."""
        if self.produced - self.taken > WRITTEN_BYTES_MAX:
            raise HandlerError(f"write() has left {WRITTEN_BYTES_MAX} bytes untaken: return an iterable instead")
        self._put(data)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _advance(self, bytes_max: int, one_piece: bool) -> None:
        try:
            if not self.has_begun:
                self.has_begun = True
                if not self.client.is_gone and self._begin():
                    return
            if not self.is_done:
                self._go_on(bytes_max, one_piece)
        except (Exception, SystemExit) as error:
            self.error = error
            self.is_done = True
        except BaseException:
            self.is_done = True
            self._close_iterable()
            raise
        if self.is_done and self.file is None:
            self._close_iterable()

    def _close_iterable(self) -> None:
        if self.is_closed:
            return
        self.is_closed = self.is_done = True
        close, self._close, self._iterator = self._close, None, None
        try:
            if close is not None:
                close()
        except (Exception, SystemExit) as error:
            trim(error)
            said = "%s: close() of what the application returned raised %s"
            log.error(said, self.what, account_of(error), exc_info=error)

    def _begin(self) -> bool:
        """Call the application. Returns whether its answer has come, and nothing is left to do."""
        result = self._application(self._environ, self.start_response)
        if type(result) is list and len(result) == 1 and not self.pieces:  # fast path of _go_on
            item = result[0]
            if item and type(item) is bytes and self.status and not self._is_head and self._left in (None, len(item)):
                self.pieces.append(item)
                self.produced = len(item)
                self.is_committed = self.is_whole = self.is_done = self.is_closed = True
                return True
        self._close = getattr(result, "close", None)
        if type(result) is FileWrapper and self.status and not self.produced and self._send_file(result):
            return False
        self.is_whole = type(result) in (list, tuple)
        if self._is_head and self.is_whole and not self.is_committed and all(type(each) is bytes for each in result):
            self.unsent_bytes = sum(map(len, result))
        try:
            self._iterator = iter(result)
        except TypeError as error:
            if self._close is None and not hasattr(type(result), "__iter__"):
                raise HandlerError(f"an application returns an iterable of bytes, not {result!r}") from error
            raise
        return False

    def _go_on(self, bytes_max: int, one_piece: bool) -> None:
        """Take items, until enough bytes wait or all of the body has come."""
        iterator = self._iterator
        assert iterator is not None or self.client.is_gone
        while not self.client.is_gone and not (self.is_committed and (self._left == 0 or self._is_head)):
            try:
                item = next(iterator)  # type: ignore[arg-type]
            except StopIteration:
                break
            if not item and type(item) is bytes:
                continue
            self._put(item)
            has_enough = self.produced - self.taken >= bytes_max or (one_piece and not self.is_whole)
            if has_enough and self._left != 0:
                return
        self.is_done = True
        if not self.status and not self.client.is_gone:
            raise HandlerError("the application returned without a call of start_response()")
        self.is_committed = True
        if self._left and not self._is_head and not self.client.is_gone:
            log.warning("%s: the answer is %d bytes shorter than its Content-Length", self.what, self._left)

    def _put(self, item: Any) -> None:
        if type(item) is not bytes:
            raise HandlerError(f"an application's body is of bytes, not of {type(item).__name__}")
        if not self.status:
            raise HandlerError("the application sent a body before it called start_response()")
        if not item:
            return
        self.is_committed = True
        if self._left is not None:
            if len(item) > self._left:
                if self.has_body and not self._is_head:
                    log.warning("%s: the answer is longer than its Content-Length, and is cut", self.what)
                item = item[: self._left]
            self._left -= len(item)
        if item and not self._is_head:
            self.pieces.append(item)
            self.produced += len(item)
        if self.on_piece is not None and not self.signalled and not self.is_whole:
            self.signalled = True
            self.on_piece(self)

    def _send_file(self, wrapper: FileWrapper) -> bool:
        """Have the kernel copy a plain file. Returns False if the wrapper holds another kind of file."""
        rest = wrapper.rest()
        if rest is None:
            return False
        offset, count = rest
        if self.length is not None and count < self.length and not self._is_head:
            log.warning("%s: the file is %d bytes shorter than its Content-Length", self.what, self.length - count)
        if self.length is None and self.has_body:
            self.length = count
            self.head += f"Content-Length: {count}\r\n"
        self.is_committed = self.is_done = True
        if self.has_body and not self._is_head:
            self.file = wrapper.file, offset, min(count, self.length or 0)
        return True


def named(application: Any) -> str:
    """Return the name of an application, and where it is defined."""
    own = application if hasattr(application, "__qualname__") else type(application)
    return f"{own.__qualname__} ({place_of(own)})"


def _status_line(status: str) -> tuple[int, str]:
    found = _STATUS.fullmatch(status) if type(status) is str else None
    if found is None:
        raise HandlerError(f'the status of start_response() is text such as "200 OK", not {status!r}')
    return int(found[1]), f"HTTP/1.1 {status}\r\n" if len(status) > 3 else f"HTTP/1.1 {status} \r\n"


def _checked(field: Any) -> tuple[str, int | str | None]:
    """Check a field. Returns its line, which may be "", and what the call must know.

    That is None, the number of a Content-Length, or one of what `ApplicationCall.said` has.
    """
    if type(field) is not tuple or len(field) != 2:
        raise HandlerError(f"a header field is a pair of texts, not {field!r}")
    name, value = field
    if type(name) is not str or _NAME.fullmatch(name) is None:
        raise HandlerError(f"a header field can't be named {name!r}: use letters, digits and hyphens")
    if type(value) is not str or _VALUE.fullmatch(value) is None:
        raise HandlerError(f"the header field {name} can't be {value!r}: give text without ends of lines, in latin-1")
    lower = name.lower()
    if lower in _HOP_BY_HOP:
        raise HandlerError(f"an application can't send {name}: how the connection works is the server's business")
    if lower == "connection":  # the server says it itself
        return "", "close" if "close" in value.lower() else None
    if lower == "content-length":
        if _DIGITS.fullmatch(value) is None:
            raise HandlerError(f"the Content-Length {value!r} is not a number")
        return f"{name}: {value}\r\n", int(value)
    return f"{name}: {value}\r\n", lower if lower in ("date", "server") else None


# An application sends the same ones again and again.
_STATUS_LINES: Known[Any, tuple[int, str]] = Known(_status_line, 256)
_FIELDS: Known[Any, tuple[str, int | str | None]] = Known(_checked, 2048)
