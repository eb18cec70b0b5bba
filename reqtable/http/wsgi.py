"""`WSGIHandler`: serves a WSGI application (PEP 3333).

The loop reads the whole request and writes the whole answer. Only the call of the application runs where the policy
says, so a slow client holds no thread:

    inline      in the loop
    greenlet    in a greenlet of the request, if the option suspend_all_sockets is on; else as inline
    pool        in a thread of the pool. It gives the thread back while its client does not take the answer
    thread      in a thread of the request, which writes the answer too, and then closes the connection
    fork        in a child of the request, in the same way
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import tempfile
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from reqtable.handlers.declaration import state
from reqtable.handlers.transition import Transition
from reqtable.http.handler import HTTPRequestHandler
from reqtable.http.wsgi_answer import begin
from reqtable.http.wsgi_call import OUTCOME, PIECE_BYTES, ApplicationCall, Client, named
from reqtable.http.wsgi_deadline import advance_within
from reqtable.http.wsgi_environ import Networks, base_environ, believe, fill, forget, is_trusted, path_and_query
from reqtable.table.errors import ConfigurationError
from reqtable.table.tracebacks import account_of, trim
from reqtable.table.wants import flushed, hand_off

log = logging.getLogger("reqtable.http")

_FLUSHED = flushed()
_HEALTHY = b"ok\n"


class WSGIHandler(HTTPRequestHandler):
    """Serves a WSGI application (PEP 3333): `class Site(WSGIHandler): wsgi_app = staticmethod(app)`."""

    wsgi_app: ClassVar[Callable[..., Any] | None] = None  # the application

    body_bytes_max: ClassVar[int] = 128 * 2**20
    spool_bytes: ClassVar[int] = 65_536  # a body of more bytes is kept in a file without a name
    prefix: ClassVar[str] = ""  # the path of the application: SCRIPT_NAME; any other path gets 404
    health_path: ClassVar[str | None] = None  # the loop answers this path with 200
    timeout_s: ClassVar[float | None] = None  # the silence that ends a request, in seconds; not under thread
    trusted: ClassVar[Networks] = ()  # the networks of the trusted proxies
    trusts_unix: ClassVar[bool] = False  # true: clients at Unix sockets are trusted proxies, too
    proxy_headers: ClassVar[str] = "x-forwarded"  # the fields that proxies set: these, or "forwarded" (RFC 7239)
    multiprocess: ClassVar[bool] = False  # the value of wsgi.multiprocess: other processes serve, too
    on_answered: ClassVar[Any] = None  # a function that is called for each request that the application gets

    _asks_policy = True
    _kept = ("_spool",)
    _not_fields = HTTPRequestHandler._not_fields | {"_base", "_client"}
    _no_data: ClassVar[Mapping[str, str]] = {"_running": "its application is running"}

    _stall_mend: ClassVar[str] = "serve the application under policy 'pool'"

    # Not fields: they belong to this process.
    _running: ApplicationCall | None = None
    _spool: Any = None
    _base: dict[str, Any] | None = None
    _client: Client | None = None
    _bases: ClassVar[WeakKeyDictionary[Any, dict[str, Any]]] = WeakKeyDictionary()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give the state `application` the timeout of this class."""
        if vars(cls).get("timeout_s") is not None:
            plain = WSGIHandler.application
            copy = FunctionType(
                plain.__code__, plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__
            )
            copy.__qualname__ = plain.__qualname__
            cls.application = state(OUTCOME, timeout=cls.timeout_s)(copy)  # type: ignore[method-assign]
        super().__init_subclass__(**kwargs)

    @classmethod
    def on_start(cls, server: Any) -> None:
        """Raise ConfigurationError if the application can't be served."""
        if not callable(cls.wsgi_app):
            raise ConfigurationError(f"{cls.__name__} has no application: wsgi_app = staticmethod(application)")
        super().on_start(server)

    # -- the request --------------------------------------------------------------------------------------------------

    def on_body(self, piece: bytes) -> Transition:
        """Keep a piece of the body: in memory, or in a file once the body is long."""
        request = self.request
        if self._spool is not None:
            self._spool.write(piece)
        else:
            request.pieces.append(piece)
            if request.received > self.spool_bytes:
                self._spool = tempfile.TemporaryFile()  # noqa: SIM115  # closed when the request ends
                self._spool.writelines(request.pieces)
                request.pieces.clear()
        return None

    def respond(self) -> Transition:
        """Have the application answer the request, which has come whole."""
        path, query = path_and_query(self.request.head)
        if path == self.health_path:
            self.request.is_logged = False
            return self.answer(200, _HEALTHY, content_type="text/plain")
        if self.prefix and path != self.prefix and not path.startswith(self.prefix + "/"):
            return self.answer(404)
        if self.on_answered is not None:
            self.on_answered()
        policy: Any = self.entry.policy
        if policy.takes_whole_requests and self.entry.table.driving_policy is None:
            self.request.known_as = self.request.id  # here and in the child
            return self.handed_off, hand_off(policy.name)
        return self._call(path, query)

    @state()
    def handed_off(self, _: None) -> Transition:
        """A thread or a child has the request."""
        return self._call(*path_and_query(self.request.head))

    def _call(self, path: str, query: str) -> Transition:
        environ = self._environ(path, query)
        client = self._client
        if client is None:
            client = self._client = Client(self.entry.transport.request)
        environ["reqtable.disconnected"] = client.disconnected
        is_head = self.request.head.method == "HEAD"
        call = self._running = ApplicationCall(type(self).wsgi_app, environ, is_head, client)
        return self._advance(call)

    @state(OUTCOME)
    def application(self, _: None) -> Transition:
        """The application has sent something or has returned, or the client has taken what was sent."""
        call = self._running
        return None if call is None else self._go_on(call)

    # -- the answer ---------------------------------------------------------------------------------------------------

    def _go_on(self, call: ApplicationCall) -> Transition:
        """Send what has come of the answer. Then end the answer, or have the application go on."""
        call.signalled = False
        is_out = call.is_out  # before `pieces` is looked at: afterwards more may come
        is_done = call.is_done and not is_out
        is_sent_at_once = is_done and call.error is None and call.file is None and call.produced <= PIECE_BYTES
        if is_sent_at_once and not self.reply.status:
            return self._answer_whole(call)
        sent = self._transmit(call, is_done)
        if call.pieces:
            return self.application, _FLUSHED
        if is_done:
            if call.file is None or call.error is not None:
                return self._end_call(call)
            self.send_file(*call.file)
            self.reply.sent, self.reply.left = call.file[2], (self.reply.left or 0) - call.file[2]
            call.file = None
            return self.application, _FLUSHED  # the file must stay open until then
        if is_out:
            return self.application, OUTCOME
        if sent:
            return self.application, _FLUSHED  # the application goes on only as fast as the client takes the answer
        return self._advance(call)

    def _answer_whole(self, call: ApplicationCall) -> Transition:
        """Send a whole answer.

        fast path of _go_on: most answers are whole before any of them has left.
        """
        self._running = None
        may_keep = not self._drains() and self.entry.table.driving_policy is None
        reply = self.reply
        data = begin(reply, call, self.request.head, may_keep, self.server_name)
        pieces, size = call.pieces, call.produced
        if pieces:
            body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            data += b"%x\r\n%b\r\n" % (size, body) if reply.is_chunked else body
            reply.sent = size
            if reply.left is not None:
                reply.left -= size
        self.send(data)
        self._close_spool()
        return self.end_answer()

    def _advance(self, call: ApplicationCall) -> Transition:
        """Have the application begin or go on."""
        policy: Any = self.entry.policy
        if not policy.steps_on_loop and not policy.takes_whole_requests:
            return self._run_in_pool(call)
        if getattr(policy, "suspends_all", False):
            from reqtable.http.wsgi_green import GreenCall  # only here, because it needs greenlet

            begun: Transition = GreenCall(self, call).begin()
            return begun
        most = self.entry.table.limits.high_water_bytes
        if self.timeout_s is None:
            call.advance(most, True)
        elif not advance_within(call, most, self.timeout_s):
            return self._time_out(call)
        return self._go_on(call)

    def _transmit(self, call: ApplicationCall, is_done: bool) -> bool:
        """Move pieces of the answer to the output, after the head. Returns whether there was something."""
        out: list[bytes] = []
        if not self.reply.status:
            if call.error is not None and is_done:
                call.pieces.clear()  # nothing has left: the answer is 500
            if not call.is_committed or (call.error is not None and is_done):
                return False
            # A thread or a child has one request, so its connection closes.
            may_keep = not self._drains() and self.entry.table.driving_policy is None
            out.append(begin(self.reply, call, self.request.head, may_keep, self.server_name))
        reply, pieces = self.reply, call.pieces
        room = min(PIECE_BYTES, self.entry.table.limits.output_bytes_max // 2)
        while pieces and room > 0:
            piece = pieces.popleft()
            if len(piece) > room:
                pieces.appendleft(memoryview(piece)[room:])
                piece = piece[:room]
            size = len(piece)
            room -= size
            call.taken += size
            reply.sent += size
            if reply.left is not None:
                reply.left -= size
            out.append(b"%x\r\n%b\r\n" % (size, piece) if reply.is_chunked else piece)
        if out:
            self.send(out[0] if len(out) == 1 else b"".join(out))
        return bool(out)

    def _end_call(self, call: ApplicationCall) -> Transition:
        """End the answer: all of it was sent, or the application has failed."""
        self._running = None
        self._close_spool()
        call.close()
        if call.error is None:
            return self.end_answer()
        if trim(call.error):
            log.error("%s: %s", call.what, account_of(call.error), exc_info=call.error)
        else:  # no line of the application raised it
            log.error("%s: %s: %s", call.what, named(type(self).wsgi_app), call.error)
        if not self.reply.status:
            return self.answer(500)
        return _break_off(self)

    # -- in the pool --------------------------------------------------------------------------------------------------

    def _run_in_pool(self, call: ApplicationCall) -> Transition:
        """Have a thread of the pool run the application."""
        entry, policy = self.entry, self.entry.policy
        entry.expect_result()
        post = entry.table.owner.post  # type: ignore[union-attr]
        most = entry.table.limits.high_water_bytes
        if call.on_piece is None:
            call.on_piece = functools.partial(post, self._came)

        def run() -> None:
            try:
                call.advance(most, False)
            finally:
                post(self._returned, call)

        call.is_out = True
        policy.run(run)  # type: ignore[attr-defined]
        return self.application, OUTCOME

    def _came(self, call: ApplicationCall) -> None:
        """In the loop: a piece of the answer has come."""
        entry = self.entry
        if call is self._running and entry.table.owner is not None:
            entry.table.owner.deliver(entry, entry.call_number, None)

    def _returned(self, call: ApplicationCall) -> None:
        """In the loop: the thread is done, with the call or for now."""
        call.is_out = False
        if call.client.is_gone:
            self._give_up(call)
        else:
            self._came(call)

    def _give_up(self, call: ApplicationCall) -> None:
        """Have an application whose answer nobody takes clean up. One that runs in a thread can't be stopped."""
        call.client.is_gone = True
        if call.is_out or call.is_closed or not call.has_begun:
            return
        run = getattr(self.entry.policy, "run", None)
        if run is not None and call.file is None:
            with contextlib.suppress(RuntimeError):  # the pool has closed
                run(call.close)
                return
        call.close()

    # -- what goes wrong ----------------------------------------------------------------------------------------------

    def on_timeout(self) -> Transition:
        call = self._running
        return super().on_timeout() if call is None else self._time_out(call)

    def _time_out(self, call: ApplicationCall) -> Transition:
        """Answer 504, or 503 if the application has not even begun. Close the connection if the head has left."""
        self._running = None
        began = call.has_begun
        log.warning(
            "%s: %s %g s",
            call.what,
            "the application was silent for" if began else "no thread was free for",
            self.timeout_s,
        )
        self._give_up(call)
        if self.reply.status:
            return _break_off(self)
        return self._refuse(504 if began else 503)

    def _apology(self, has_connections: bool) -> bytes:
        call = self._running
        if call is not None:
            call.client.is_gone = True
        return super()._apology(has_connections)

    def on_close(self) -> None:
        call, self._running = self._running, None
        if call is not None:
            self._give_up(call)
        self._close_spool()
        super().on_close()

    def _leave(self) -> None:
        self._close_spool()  # the child has a copy
        super()._leave()

    # -- what the application is given --------------------------------------------------------------------------------

    def _environ(self, path: str, query: str) -> dict[str, Any]:
        request, entry = self.request, self.entry
        head = request.head
        environ = (self._base or _base_of(self)).copy()
        if self.prefix:
            environ["SCRIPT_NAME"] = self.prefix
            path = path[len(self.prefix) :]
        fill(environ, head, path, query, entry.peer)
        if head.is_chunked:
            environ["CONTENT_LENGTH"] = str(request.received)
        if self._spool is not None:
            self._spool.seek(0)
            environ["wsgi.input"] = self._spool
        else:
            environ["wsgi.input"] = io.BytesIO(request.body)
            request.body = b""
        environ["reqtable.request_id"] = request.identify()
        if self.trusted or self.trusts_unix:
            if is_trusted(entry.peer, self.trusted, self.trusts_unix):
                believe(environ, self.proxy_headers, self.trusted)
                request.client = environ["REMOTE_ADDR"]
            else:
                forget(environ)
        return environ

    def _close_spool(self) -> None:
        if self._spool is not None:
            self._spool.close()
            self._spool = None


def _base_of(handler: WSGIHandler) -> dict[str, Any]:
    """Return what the requests of the handler's server have in common."""
    bases, server = handler._bases, handler.server
    base = bases.get(server)
    if base is None:
        policy: Any = handler.entry.policy
        shares = (not policy.steps_on_loop and not policy.forks) or getattr(policy, "suspends_all", False)
        is_tls = handler.tls is not None
        base = bases[server] = base_environ(handler.entry.local, is_tls, shares, handler.multiprocess or policy.forks)
    handler._base = base
    return base


def _break_off(handler: WSGIHandler) -> Transition:
    """Have the connection close: the client sees that the answer is not complete."""
    handler.reply.is_chunked = handler.reply.keep_alive = False
    handler._log()
    handler.reply.is_done = True
    return None


def wsgi_handler(application: Callable[..., Any], **settings: Any) -> type[WSGIHandler]:
    """Return a handler class that serves `application`. `settings` are the attributes of `WSGIHandler` to set.

    Raises TypeError for a setting that does not exist.
    """
    for name in settings:
        if name.startswith("_") or not hasattr(WSGIHandler, name):
            raise TypeError(f"WSGIHandler has no setting {name!r}")
    on_answered = settings.get("on_answered")
    if on_answered is not None:
        settings["on_answered"] = staticmethod(on_answered)
    return type("WSGI", (WSGIHandler,), {"wsgi_app": staticmethod(application), **settings})
