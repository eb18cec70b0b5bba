"""`Exchange`: how an HTTP/1.1 connection is read, as a state machine. `HTTPRequestHandler` adds the answers.

The states of one request: `head`, then for its body `body`, or `chunk_size`, `chunk` and `chunk_end` in turn and
`trailers`, then the states of the answer. Between two requests the connection is in `head` again. The field `request`
has whatever has come of a request, and the field `reply` what was sent of its answer. Both are plain data.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from reqtable.handlers.declaration import state
from reqtable.handlers.state import StateRequestHandler
from reqtable.handlers.transition import Transition
from reqtable.http.head import Fields, Head
from reqtable.http.messages import Reply, Request
from reqtable.http.wants import CHUNK_END, CHUNK_SIZE, HEAD_BYTES, TRAILERS, head
from reqtable.table.errors import HandlerError
from reqtable.table.places import place_of
from reqtable.table.want import Want
from reqtable.table.wants import chunk

PIECE_BYTES = 65_536
DROPPED_BYTES_MAX = 262_144  # of a body whose request has its answer already; above it the connection closes
_HEAD = head(HEAD_BYTES)
OWN_STATES = ("head", "body", "chunk_size", "chunk", "chunk_end", "trailers")


class Exchange(StateRequestHandler):
    """Reads requests. A class derived from it answers them."""

    request: Request
    reply: Reply

    _is_over = False  # it has had its last words: see `_apology`

    _not_fields = StateRequestHandler._not_fields | {"_is_over"}

    head_bytes_max: ClassVar[int] = HEAD_BYTES  # the longest head, in bytes; above it 431, or 414
    body_bytes_max: ClassVar[int] = 2**20  # the longest body, in bytes; above it 413

    _hooks = StateRequestHandler._hooks | {"on_head": ("self",), "on_body": ("self", "piece")}

    _needs_stream = True

    _awaiting = "wait in a state, as by return self.name, call(f)"

    _awaited_head: ClassVar[Want[Head]] = _HEAD

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raise HandlerError if a state of the class has the name of one of HTTP's own."""
        for name in OWN_STATES:  # first: to declare it as a state would not help
            own = getattr(cls, name)
            if own is not getattr(Exchange, name):
                raise HandlerError(
                    f"{cls.__name__}.{name}: HTTPRequestHandler has a state {name} of its own: rename yours "
                    f"({place_of(own)})"
                )
        super().__init_subclass__(**kwargs)
        cls._example = next((name for name in cls._declared() if name not in OWN_STATES), "name")
        cls._awaited_head = head(cls.head_bytes_max)

    # -- what a class derived from it does ----------------------------------------------------------------------------

    def on_head(self) -> Transition:
        """Called when the head has come. May return a transition, as to an answer; None goes on with the body."""
        return None

    def on_body(self, piece: bytes) -> Transition:
        """Called with each piece of the body; the default keeps it. May return a transition, as to an answer."""
        self.request.pieces.append(piece)
        return None

    def read_body(self) -> Transition:
        """Return the transition to what is still to come of the body, or the answer's if the body is whole.

        For an `on_head` or `on_body` that went to a state of its own first, such as one that waits for `flushed()`.
        """
        request = self.request
        if request.is_whole:
            return self._answered()
        if not request.is_asked_for:
            request.is_asked_for = True
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if request.left:
            return self._more(self.chunk if request.head.is_chunked else self.body)
        if request.head.is_chunked:
            return self.chunk_end if request.received else self.chunk_size
        return self._whole()

    def _answered(self) -> Transition:
        """Answer the request, which is whole. Returns a transition."""
        raise NotImplementedError

    def _refuse(self, status: int, reason: str = "") -> Transition:
        """Answer a request that can't be read to its end, and close the connection."""
        raise NotImplementedError

    # -- the states ---------------------------------------------------------------------------------------------------

    def start(self) -> Transition:
        self.request = Request()
        self.reply = Reply()
        self.entry.began_at = None
        return self.head, self._awaited_head

    @state(_HEAD)
    def head(self, head: Head) -> Transition:
        """The head of a request has come."""
        reply, entry = self.reply, self.entry
        if not reply.is_done:
            raise HandlerError(f"{type(self).__name__} went on to the next request without an answer to this one")
        entry.began_at = now = entry.table.now
        self.request = request = Request(head, began_at=now)
        reply.owe()
        if head.expects_continue:
            request.is_asked_for = False
        if head.is_chunked or head.content_length:
            request.is_whole = False
            request.left = head.content_length or 0
            if request.left > self.body_bytes_max:
                return self._refuse(413, f"the body exceeds {self.body_bytes_max} bytes")
        early = self.on_head()
        if early is not None:
            self._checked(early, self.on_head)
            return early
        if reply.is_done:  # it has answered, and the connection closes
            return self._after_answer()
        return self._answered() if request.is_whole else self.read_body()

    @state()
    def body(self, piece: bytes) -> Transition:
        """A piece of a body of known length has come."""
        return self._take(piece)

    @state(CHUNK_SIZE)
    def chunk_size(self, size: int) -> Transition:
        """The size of the next chunk has come."""
        request = self.request
        if not size:
            return self.trailers
        if request.is_dropped and request.received + size > DROPPED_BYTES_MAX:
            return None
        if request.received + size > self.body_bytes_max and not request.is_dropped:
            return self._refuse(413, f"the body exceeds {self.body_bytes_max} bytes")
        request.left = size
        return self._more(self.chunk)

    @state()
    def chunk(self, piece: bytes) -> Transition:
        """A piece of a chunk has come."""
        return self._take(piece)

    @state(CHUNK_END)
    def chunk_end(self, _: None) -> Transition:
        """The end of a chunk has come."""
        return self.chunk_size

    @state(TRAILERS)
    def trailers(self, fields: Fields) -> Transition:
        """The fields after a chunked body have come."""
        self.request.trailers = fields
        return self._whole()

    # -- for a record of the request ----------------------------------------------------------------------------------

    def _save(self) -> tuple[str | None, dict[str, Any], bool]:
        """Return the request as data. Its time is in seconds from now: another process has another clock."""
        name, fields, ended = super()._save()
        if "request" in fields:
            fields["request"] = self._moved(fields["request"], -self.entry.table.now)
        if "reply" in fields:
            fields["reply"] = replace(fields["reply"])
        return name, fields, ended

    def _restore(self, saved: tuple[str | None, dict[str, Any], bool], made_at: float) -> None:
        super()._restore(saved, made_at)
        if "request" in saved[1]:
            self.request = self._moved(self.request, made_at)

    @staticmethod
    def _moved(request: Request, seconds: float) -> Request:
        return replace(request, pieces=[*request.pieces], began_at=request.began_at + seconds)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _more(self, target: Any) -> tuple[Any, Want[bytes]]:
        return target, chunk(min(self.request.left, PIECE_BYTES))

    def _take(self, piece: bytes) -> Transition:
        request = self.request
        request.left -= len(piece)
        request.received += len(piece)
        if not request.is_dropped:
            early = self.on_body(piece)
            if early is not None:
                self._checked(early, self.on_body)
                return early
            if self.reply.is_done:
                return self._after_answer()
        return self.read_body()

    def _whole(self) -> Transition:
        request = self.request
        request.is_whole = True
        if request.is_dropped:
            return self._after_answer()
        request.body = request.pieces[0] if len(request.pieces) == 1 else b"".join(request.pieces)
        request.pieces = []
        return self._answered()

    def _after_answer(self) -> Transition:
        """Return the transition after an answer that is complete: to the next request, or None, which closes."""
        request, reply = self.request, self.reply
        if not reply.keep_alive or self._is_over:
            return None
        if request.is_whole:
            self.entry.began_at = None
            return self.head if self._awaited_head is _HEAD else (self.head, self._awaited_head)
        if not request.is_asked_for or (request.head.content_length or 0) > DROPPED_BYTES_MAX:
            return None
        request.is_dropped = True
        request.pieces = []
        return self.read_body()
