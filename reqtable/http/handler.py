"""`HTTPRequestHandler`: an HTTP/1.1 connection as a state machine. Derive a class for an API.

The states of one request: `head`, then for its body `body`, or `chunk_size`, `chunk` and `chunk_end` in turn and
`trailers`, then the states of the answer. Between two requests the connection is in `head` again. The field `request`
has whatever has come of a request, and the field `reply` what was sent of its answer. Both are plain data.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from reqtable.handlers.state import StateRequestHandler, Transition, state
from reqtable.http.answer import NO_BODY, FieldsLike, date, head_of, pairs_of, phrase_of
from reqtable.http.head import BadRequest, Fields, Head
from reqtable.http.wants import CHUNK_END, CHUNK_SIZE, TRAILERS, head
from reqtable.table.errors import HandlerError, LimitExceeded
from reqtable.table.wants import Want, chunk

PIECE_BYTES = 65_536
_OWN_STATES = ("head", "body", "chunk_size", "chunk", "chunk_end", "trailers")
_EMPTY = Head("", "/", (1, 1), (), None, False, False, False, None)


@dataclass(slots=True)
class Request:
    """Holds what has come of a request."""

    head: Head = _EMPTY
    body: bytes = b""  # the whole body, once it has come
    trailers: Fields = ()
    pieces: list[bytes] = field(default_factory=list)  # of a body that is still coming
    received: int = 0  # bytes of the body so far
    left: int = 0  # bytes of the body, or of this chunk, that are still to come
    is_whole: bool = True

    @property
    def method(self) -> str:
        return self.head.method

    @property
    def path(self) -> str:
        """The path, still with its escapes."""
        return self.head.path

    @property
    def query(self) -> str:
        return self.head.query

    def get(self, name: str, default: str | None = None) -> str | None:
        """Return the value of a header field, by its name in lower case; several are joined by ", "."""
        return self.head.get(name, default)


@dataclass(slots=True)
class Reply:
    """Holds what was sent of an answer."""

    status: int = 0  # 0: nothing yet
    has_body: bool = True
    is_chunked: bool = False
    left: int | None = None  # bytes of the body that are still to be sent; None: not known beforehand
    sent: int = 0  # bytes of the body so far
    keep_alive: bool = False
    is_done: bool = True


class HTTPRequestHandler(StateRequestHandler):
    """Serves HTTP/1.1. Define `do_GET`, `do_POST` and so on; each returns a transition, such as `self.answer(200, …)`.

    `do_GET` also serves HEAD. The method is called when the request is whole; `self.request` has it. To answer before
    the body has come, or to refuse it, override `on_head`; to take the body in pieces, `on_body`.
    """

    request: Request
    reply: Reply

    body_bytes_max: ClassVar[int] = 2**20  # above it, a request is answered with 413
    server_name: ClassVar[str | None] = "reqtable"  # the field Server; None: left out

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raise HandlerError if a state of the class has the name of one of HTTP's own."""
        super().__init_subclass__(**kwargs)
        for name in _OWN_STATES:
            if getattr(cls, name) is not getattr(HTTPRequestHandler, name):
                raise HandlerError(
                    f"{cls.__name__}.{name}: HTTPRequestHandler has a state {name} of its own: rename it"
                )

    # -- for the author of a handler ----------------------------------------------------------------------------------

    def on_head(self) -> Transition:
        """Called when the head has come. May return a transition, as to an answer; None goes on with the body."""
        return None

    def on_body(self, piece: bytes) -> Transition:
        """Called with each piece of the body; the default keeps it. May return a transition, as to an answer."""
        self.request.pieces.append(piece)
        return None

    def respond(self) -> Transition:
        """Answer the request, which has come whole. The default calls `do_GET` for GET, and so on."""
        method = self.request.method
        serve = getattr(self, f"do_{method}", None)
        if serve is None and method == "HEAD":
            serve = getattr(self, "do_GET", None)
        if serve is not None:
            return serve()
        allowed = sorted(name[3:] for name in dir(type(self)) if name.startswith("do_"))
        if "GET" in allowed and "HEAD" not in allowed:
            allowed.append("HEAD")
        is_known = method in ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE")
        return self.answer(405 if is_known else 501, fields={"Allow": ", ".join(allowed)} if is_known else ())

    def answer(
        self, status: int, body: bytes | str = b"", fields: FieldsLike = (), content_type: str | None = None
    ) -> Transition:
        """Send a whole answer. Returns the transition to the next request, or to the end.

        A body of text is sent in UTF-8. Without a body and a content type, an error gets a line of text.
        """
        if not body and status >= 400 and content_type is None:
            body = f"{status} {phrase_of(status)}\n"
        if isinstance(body, str):
            body = body.encode()
            content_type = content_type or "text/plain; charset=utf-8"
        own = pairs_of(fields)
        if content_type is not None and (body or status not in NO_BODY):
            own += pairs_of({"Content-Type": content_type})
        self.begin_answer(status, own, length=len(body))
        if body:
            self.write(body)
        return self.end_answer()

    def begin_answer(self, status: int, fields: FieldsLike = (), length: int | None = None) -> None:
        """Send the head of an answer, whose body `write` sends. `length` is that of the body; None: it is not known."""
        request, reply = self.request, self.reply
        if not reply.is_done and reply.status >= 200:
            raise HandlerError(f"{type(self).__name__} answers the same request twice: call begin_answer() once")
        own = pairs_of(fields)
        if status < 200:
            self.send(head_of(status, own))
            return
        names = {name.lower() for name, _ in own}
        has_body = status not in NO_BODY
        keep_alive = request.head.keep_alive and request.is_whole and not self._is_draining
        is_chunked = False
        if has_body and length is None:
            is_chunked = request.head.version == (1, 1)
            keep_alive = keep_alive and is_chunked
        if "connection" in names:
            keep_alive = keep_alive and not any(n.lower() == "connection" and "close" in v.lower() for n, v in own)
        if "date" not in names:
            own.append(("Date", date()))
        if self.server_name is not None and "server" not in names:
            own.append(("Server", self.server_name))
        if has_body and length is not None and "content-length" not in names:
            own.append(("Content-Length", str(length)))
        if is_chunked:
            own.append(("Transfer-Encoding", "chunked"))
        if "connection" not in names and (not keep_alive or request.head.version == (1, 0)):
            own.append(("Connection", "keep-alive" if keep_alive else "close"))
        is_head = request.method == "HEAD"
        self.reply = Reply(status, has_body and not is_head, is_chunked and not is_head, length, 0, keep_alive, False)
        self.send(head_of(status, own))

    def write(self, data: bytes) -> None:
        """Send a piece of the body. Raises HandlerError if it is more than was promised."""
        reply = self.reply
        if reply.is_done:
            raise HandlerError("write() without begin_answer(): send the head first")
        if reply.left is not None and len(data) > reply.left:
            raise HandlerError(f"the body is longer than its Content-Length, by {len(data) - reply.left} bytes")
        if reply.left is not None:
            reply.left -= len(data)
        if not data or not reply.has_body:
            return
        reply.sent += len(data)
        self.send(b"%x\r\n%b\r\n" % (len(data), data) if reply.is_chunked else data)

    def end_answer(self) -> Transition:
        """End the answer. Returns the transition to the next request, or None: the connection closes."""
        reply = self.reply
        if reply.is_chunked:
            self.send(b"0\r\n\r\n")
        is_short = reply.has_body and bool(reply.left)
        reply.is_done = True
        if is_short or not reply.keep_alive:
            return None
        return self.head

    # -- the states ---------------------------------------------------------------------------------------------------

    def start(self) -> Transition:
        self.request = Request()
        self.reply = Reply()
        return self.head

    @state(head())
    def head(self, head: Head) -> Transition:
        """The head of a request has come."""
        self.request = request = Request(head, left=head.content_length or 0, is_whole=not head.has_body)
        self.reply = Reply()
        if request.left > self.body_bytes_max:
            return self.answer(413)
        early = self.on_head()
        if early is not None or self.reply.status >= 200:
            return early
        if not head.has_body:
            return self.respond()
        if head.expects_continue:
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        return self.chunk_size if head.is_chunked else self._more(self.body)

    @state()
    def body(self, piece: bytes) -> Transition:
        """A piece of a body of known length has come."""
        early = self._take(piece)
        if early is not None or self.reply.status >= 200:
            return early
        return self._more(self.body) if self.request.left else self._whole()

    @state(CHUNK_SIZE)
    def chunk_size(self, size: int) -> Transition:
        """The size of the next chunk has come."""
        if self.request.received + size > self.body_bytes_max:
            return self.answer(413)
        if not size:
            return self.trailers
        self.request.left = size
        return self._more(self.chunk)

    @state()
    def chunk(self, piece: bytes) -> Transition:
        """A piece of a chunk has come."""
        early = self._take(piece)
        if early is not None or self.reply.status >= 200:
            return early
        return self._more(self.chunk) if self.request.left else self.chunk_end

    @state(CHUNK_END)
    def chunk_end(self, _: None) -> Transition:
        """The end of a chunk has come."""
        return self.chunk_size

    @state(TRAILERS)
    def trailers(self, fields: Fields) -> Transition:
        """The fields after a chunked body have come."""
        self.request.trailers = fields
        return self._whole()

    # -- what goes wrong ----------------------------------------------------------------------------------------------

    def on_error(self, error: Exception) -> Transition:
        """Answer what can't be served: 400 and the like for a bad request, 500 if the handler failed."""
        if isinstance(error, BadRequest):
            return self._refuse(error.status, error.reason)
        if self.reply.status < 200:
            self._refuse(500)
        raise error

    def on_eof(self, partial: bytes) -> Transition:
        """Refuse a request that the client has not finished. Between two requests, just end."""
        if partial or self.state_name != "head":
            return self._refuse(400, "the connection ended before the request was complete")
        return None

    def on_timeout(self) -> Transition:
        """Answer 408 if a request has begun to come. Between two requests, just end."""
        if len(self.entry.input) or self.state_name != "head":
            return self._refuse(408)
        return None

    def on_limit(self, error: LimitExceeded) -> Transition:
        return self._refuse(413)

    # -- inside -------------------------------------------------------------------------------------------------------

    @property
    def _is_draining(self) -> bool:
        return bool(getattr(self.server, "_is_draining", False))

    def _more(self, target: Any) -> tuple[Any, Want[bytes]]:
        return target, chunk(min(self.request.left, PIECE_BYTES))

    def _take(self, piece: bytes) -> Transition:
        request = self.request
        request.left -= len(piece)
        request.received += len(piece)
        return self.on_body(piece)

    def _whole(self) -> Transition:
        request = self.request
        request.body, request.pieces = b"".join(request.pieces), []
        request.is_whole = True
        return self.respond()

    def _refuse(self, status: int, reason: str = "") -> Transition:
        """Answer a request that can't be read to its end, and close the connection."""
        if self.reply.status >= 200:
            return None
        self.request.is_whole = False  # so that the connection closes
        words = f"{status} {phrase_of(status)}{': ' if reason else ''}{reason}\n"
        self.answer(status, words)
        return None
