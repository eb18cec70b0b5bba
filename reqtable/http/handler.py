"""`HTTPRequestHandler`: an HTTP/1.1 connection as a state machine. Derive a class for an API."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, ClassVar

from reqtable.handlers.finding import Finding
from reqtable.handlers.transition import Transition
from reqtable.http.access import access, log_request
from reqtable.http.answer import (
    NO_BODY,
    FieldsLike,
    bytes_of,
    check_status,
    date,
    has_type,
    head_of,
    line_of,
    pairs_and_lines,
    pairs_of,
    phrase_of,
    status_line,
)
from reqtable.http.events import encode_event
from reqtable.http.exchange import DROPPED_BYTES_MAX
from reqtable.http.head import BadRequest
from reqtable.http.messages import NO_HEAD, Reply, Request
from reqtable.http.methods import Methods
from reqtable.table.errors import ConnectFailed, HandlerError, LimitExceeded, TimedOut
from reqtable.table.places import place_of

_KNOWN_METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"}
# The fields by which we say where the answer ends, and whether the connection does: never sent as they are given.
_LARGE_BYTES = 65_536  # of a body: above it, look whether the output has room for it
_OURS = {"content-length", "transfer-encoding", "connection"}


class HTTPRequestHandler(Methods):
    """Serves HTTP/1.1 (RFC 9112). Define `do_GET` and so on, or methods with a `@route("GET", "/notes/{id}")`.

    Each returns a transition, such as `self.answer(200, …)`. It is called when the request is whole; `self.request` has
    it. The method for GET also serves HEAD. To answer before the body has come, or to refuse it, override `on_head`; to
    take the body in pieces, `on_body`.
    """

    server_name: ClassVar[str | None] = "reqtable"  # the value of the field Server; None: no such field

    _logs_requests: ClassVar[bool] = True  # so the engine logs no line for the connection
    _is_in_access_log: ClassVar[bool] = True
    _owes_answers: ClassVar[bool] = True

    @classmethod
    def _unfit(cls) -> Finding | None:
        own = HTTPRequestHandler
        if cls._methods or cls._routes or cls.respond is not own.respond or cls.on_head is not own.on_head:
            return None
        mend = 'define do_GET(self), or put @route("GET", "/") before a method'
        return Finding("no-state", place_of(cls), f"{cls.__name__} answers no request", mend)

    # -- for the author of a handler ----------------------------------------------------------------------------------

    def respond(self) -> Transition:
        """Answer the request, which has come whole. The default calls the method of its route, or `do_GET` for GET."""
        method = self.request.method
        if self._routes:
            methods, arguments = self._routes.find(self.request.path)
            name = methods.get(method) or (methods.get("GET") if method == "HEAD" else None)
            if name is not None:
                answered: Transition = getattr(self, name)(**arguments)
                return answered
            if methods:
                return self._answer_without_method({*methods})
        serve: Callable[[], Transition] | None = getattr(self, f"do_{method}", None)
        if serve is None and method == "HEAD":
            serve = getattr(self, "do_GET", None)
        if serve is not None:
            return serve()
        if self._routes and self.request.path != "*":
            return self.answer(404)
        return self._answer_without_method({*self._methods})

    def answer(
        self, status: int, body: bytes | str = b"", fields: FieldsLike = (), content_type: str | None = None
    ) -> Transition:
        """Send a whole answer. Returns the transition to the next request, or to the end.

        `fields` is a mapping, or pairs of names and values. A body of text is sent in UTF-8. Without a body and a
        content type, an error gets a line of text. A Content-Type among the fields is sent in place of `content_type`.
        Raises HandlerError, and sends nothing, if the status, a field or the body can't be sent.
        """
        if type(status) is not int:
            check_status(status)
        if not body and status >= 400 and content_type is None and body is not None:
            fields = pairs_of(fields)
            if not has_type(fields):
                body = f"{status} {phrase_of(status)}\n"
        if isinstance(body, str):
            body = body.encode()
            content_type = content_type or "text/plain; charset=utf-8"
        elif type(body) is not bytes:
            body = bytes_of(body, "answer()", "give bytes or text, as by json.dumps(…), or leave the body out")
        if len(body) > _LARGE_BYTES:
            self._check_room(len(body))
        if content_type is not None and status not in NO_BODY:
            fields = pairs_of(fields)
            if not has_type(fields):
                fields = [*fields, ("Content-Type", content_type)]
        return self._answer_with(status, fields, body)

    def begin_answer(
        self, status: int, fields: FieldsLike = (), length: int | None = None, reason: str | None = None
    ) -> None:
        """Send the head of an answer, whose body `write` sends. `length` is that of the body; None: it is not known.

        A Content-Length among the fields is taken as the length. With a status of 1xx it sends an interim answer.
        """
        if type(status) is not int:
            check_status(status)
        if status >= 200:
            self.send(self._begin(status, fields, length, reason))
            return
        self._check_unanswered()
        if self.request.head.version == (1, 1):
            self.send(head_of(status, pairs_of(fields), reason))
            self.reply.status = status

    def _answer_with(self, status: int, fields: FieldsLike, body: bytes) -> Transition:
        """Send a whole answer, in one piece."""
        if 100 <= status < 200:
            raise HandlerError(f"{status} is no answer to a request: send it by begin_answer(), before the answer")
        data = self._begin(status, fields, None if status in NO_BODY else len(body))
        reply = self.reply
        reply.left = 0
        if reply.has_body:
            reply.sent = len(body)
            data += body
        self.send(data)
        return self.end_answer()

    def _check_unanswered(self) -> None:
        if self.reply.is_done or self._is_begun:
            raise HandlerError(f"{type(self).__name__} answers the same request twice: call begin_answer() once")

    def _begin(self, status: int, fields: FieldsLike, length: int | None, reason: str | None = None) -> bytes:
        """Begin the reply. Returns the head of the answer."""
        self._check_unanswered()
        request = self.request
        pairs, lines = pairs_and_lines(fields) if fields else ([], [])
        text = status_line(status, reason)
        said: tuple[str, ...] = ()
        for line, name in lines:
            if name is None:
                text += line
            else:
                said += (name,)
                text += line if name not in _OURS else ""
        options: list[str] = []  # of Connection, such as "upgrade"
        if said and not _OURS.isdisjoint(said):
            length, options = _ours_in(pairs, length)
        is_1_1 = request.head.version == (1, 1)
        has_body = status not in NO_BODY
        is_chunked = has_body and length is None and is_1_1
        is_bounded = not has_body or length is not None or is_chunked
        keep_alive = request.head.keep_alive and is_bounded and "close" not in options and self._may_keep_alive()
        if not keep_alive or not is_1_1:
            options = ["keep-alive" if keep_alive else "close", *[each for each in options if each != "close"]]
        if "date" not in said:
            text += f"Date: {date()}\r\n"
        if self.server_name is not None and "server" not in said:
            text += line_of("Server", self.server_name)
        if is_chunked:
            text += "Transfer-Encoding: chunked\r\n"
        elif status == 205 or (length is not None and status != 204):
            text += f"Content-Length: {0 if status == 205 else length}\r\n"
        if options:
            text += f"Connection: {', '.join(options)}\r\n"
        sends_body = has_body and request.head.method != "HEAD"
        self.reply.begin(status, sends_body, is_chunked and sends_body, length, keep_alive)
        return f"{text}\r\n".encode("latin-1")

    def write(self, data: bytes) -> None:
        """Send a piece of the body. Raises HandlerError if it is more than was promised."""
        if type(data) is not bytes:
            data = bytes_of(data, "write()", "give bytes, as by text.encode()")
        reply = self.reply
        if reply.is_done or reply.status < 200:
            raise HandlerError("write() outside an answer: call begin_answer() before it, and end_answer() after it")
        if reply.left is not None:
            if len(data) > reply.left:
                raise HandlerError(f"the body is longer than its Content-Length, by {len(data) - reply.left} bytes")
            reply.left -= len(data)
        if not data or not reply.has_body:
            return
        reply.sent += len(data)
        self.send(b"%x\r\n%b\r\n" % (len(data), data) if reply.is_chunked else data)

    def end_answer(self) -> Transition:
        """End the answer. Returns the transition to the next request, or None: the connection closes.

        Raises HandlerError if the body is shorter than was promised.
        """
        reply = self.reply
        if reply.is_done or reply.status < 200:
            raise HandlerError("end_answer() outside an answer: call begin_answer() before it, once")
        if reply.left and reply.has_body:
            raise HandlerError(f"the body is shorter than its Content-Length, by {reply.left} bytes")
        if reply.is_chunked:
            self.send(b"0\r\n\r\n")
        reply.is_done = True
        self._log()
        return self._after_answer()

    def begin_events(self, fields: FieldsLike = ()) -> None:
        """Begin an answer of server-sent events, which `send_event` sends until `end_answer()`, or until the end."""
        own = {"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        names = {name.lower() for name, _ in pairs_of(fields)}
        self.begin_answer(200, [*pairs_of(fields), *[each for each in own.items() if each[0].lower() not in names]])

    def send_event(
        self, data: str = "", event: str | None = None, id: str | None = None, retry: int | None = None
    ) -> None:
        """Send a server-sent event. The arguments are those of `encode_event`, which raises HandlerError.

        To send one event to many clients, encode it once: `self.write(encode_event(…))`.
        """
        self.write(encode_event(data, event, id, retry))

    @property
    def is_draining(self) -> bool:
        """Whether the server ends once its requests are done: a stream that has no end of its own should end now."""
        return self._drains()

    # -- what goes wrong ----------------------------------------------------------------------------------------------

    def on_error(self, error: Exception) -> Transition:
        """Answer what can't be served, and report it.

        A BadRequest gets its status, also one that the handler raises. Without an answer yet, another connection that
        could not be made gets 502, one that was too slow 504, and any other error 500.
        """
        if isinstance(error, BadRequest):
            if self.request.is_whole and not self.reply.is_done and not self._is_begun:
                return self.answer(error.status, f"{error.status} {phrase_of(error.status)}: {error.reason}\n")
            return self._refuse(error.status, error.reason)
        if not self.reply.is_done and not self._is_begun:
            self._refuse(502 if isinstance(error, ConnectFailed) else 504 if isinstance(error, TimedOut) else 500)
        if self.request.head is not NO_HEAD and not hasattr(error, "__notes__"):
            error.add_note(f"while answering {self._request_line()}")
        raise error

    def on_eof(self, partial: bytes) -> Transition:
        """Refuse a request that the client has not finished. Between two requests, just end."""
        if self._is_between and not partial:
            return None
        return self._refuse(400, "the connection ended before the request was complete")

    def on_timeout(self) -> Transition:
        """Answer 408 if a request has not come in time, 503 if its answer has not. Between two requests, just end."""
        if self._is_between and not len(self.entry.input):
            return None
        return self._refuse(503 if self.request.is_whole and not self._is_between else 408)

    def on_limit(self, error: LimitExceeded) -> Transition:
        self._refuse(413)
        raise error

    # -- inside -------------------------------------------------------------------------------------------------------

    def _drains(self) -> bool:
        return getattr(self.entry.server, "_is_draining", False)

    @property
    def _is_between(self) -> bool:
        """Whether the connection waits for a request of which nothing was parsed."""
        return self.reply.is_done and self.request.is_whole

    @property
    def _is_begun(self) -> bool:
        """Whether the client has got the head of the answer, or the connection speaks something else since."""
        return self.reply.status >= 200 or self.reply.status == 101

    def _check_room(self, size: int) -> None:
        """Raise HandlerError if a body of `size` bytes can't be sent at once: its head must not leave without it."""
        room = self.entry.table.limits.output_bytes_max - self.entry.output.held
        if size > room:
            raise HandlerError(
                f"an answer of {size} bytes is more than the output takes ({room} bytes): send it in pieces, by "
                "begin_answer(), then write() in a state that waits for flushed()"
            )

    def _may_keep_alive(self) -> bool:
        """Return whether the rest of the request, if there is one, can be read before the next request."""
        request = self.request
        rest_is_read = request.is_whole or (
            request.is_asked_for and (request.head.content_length or 0) <= DROPPED_BYTES_MAX
        )
        return rest_is_read and not self._drains()

    def _answered(self) -> Transition:
        transition = self.respond()
        if transition is not None:
            return transition
        if not self.reply.is_done:
            how = "part of an answer" if self._is_begun else "no answer"
            name, place = self._source_of(self.respond)
            raise HandlerError(
                f"{name} sent {how} to {self._request_line()} and returned None: return {self._returns()} ({place})"
            )
        return self._after_answer()

    def _refuse(self, status: int, reason: str = "") -> Transition:
        """Answer a request that can't be read to its end, and close the connection."""
        if self._is_between:
            self.request = Request(began_at=self.entry.table.now)
            self.reply.owe()
        if self.reply.is_done or self._is_begun:
            return None
        words = f"{status} {phrase_of(status)}{': ' if reason else ''}{reason}\n"
        self.answer(status, words, {"Connection": "close"})
        return None

    @property
    def _is_partial(self) -> bool:
        return self._is_over or (hasattr(self, "reply") and self._is_begun and not self.reply.is_done)

    def _apology(self, has_connections: bool) -> bytes:
        """Return the answer to a request that ends before it has one, and log it; b"" between two requests.

        A step of the request may be running, in another thread. In the parent of a child, no request may have come.
        """
        request = getattr(self, "request", None) or Request()
        if self.entry.began_at is None or request.is_dropped or self._is_over:
            return b""
        self._is_over = True
        status = 504 if has_connections else 503 if request.is_whole else 408
        body = f"{status} {phrase_of(status)}\n".encode()
        fields = {"Content-Type": "text/plain; charset=utf-8", "Content-Length": str(len(body)), "Date": date()}
        if access.isEnabledFor(logging.INFO) and self._is_in_access_log:
            log_request(self, request, Reply(status, left=0, sent=len(body)))
        head = head_of(status, (fields | {"Connection": "close"}).items())
        return head if request.method == "HEAD" else head + body

    def _log(self) -> None:
        """Log the request, unless that was done when it ended early."""
        is_wanted = access.isEnabledFor(logging.INFO) and self._is_in_access_log
        if is_wanted and not self._is_over and self.request.is_logged:
            log_request(self, self.request, self.reply)

    def _shown(self) -> dict[str, Any]:
        """Return what a row of a snapshot has beside the keys of every row."""
        request = getattr(self, "request", None)
        if request is None or self._is_between:
            return {"method": None, "path": None, "status": None, "body_in": 0, "body_out": 0}
        reply = self.reply
        return {
            "method": request.method,
            "path": request.path,
            "status": reply.status or None,
            "body_in": request.received,
            "body_out": max(0, reply.sent - self.entry.output.size),  # without what is still to be sent
        }

    def _close(self) -> None:
        if hasattr(self, "reply") and not self.reply.is_done:
            self._log()
        super()._close()

    def _answer_without_method(self, methods: set[str]) -> Transition:
        """Answer a request with a method for which there is nothing. `methods` are those that there are."""
        if self.request.method not in _KNOWN_METHODS:
            return self.answer(501)
        allowed = methods | ({"HEAD", "OPTIONS"} if "GET" in methods else {"OPTIONS"})
        status = 204 if self.request.method == "OPTIONS" else 405
        return self.answer(status, fields={"Allow": ", ".join(sorted(allowed))})


def _ours_in(pairs: Any, length: int | None) -> tuple[int | None, list[str]]:
    """Return the length of the body, and the options of the connection, as an application's fields say."""
    options: list[str] = []
    for name, value in pairs:
        lower = name.lower()
        if lower == "transfer-encoding":
            raise HandlerError("an answer can't have a Transfer-Encoding of its own: leave the length out instead")
        if lower == "connection":
            options += [each.strip().lower() for each in value.split(",")]
        if lower == "content-length":
            if not value.isascii() or not value.isdigit() or (length is not None and int(value) != length):
                raise HandlerError(f"the Content-Length can't be {value!r}: the body has {length} bytes")
            length = int(value)
    return length, [each for each in options if each not in ("", "keep-alive")]
