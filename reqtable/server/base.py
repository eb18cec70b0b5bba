"""`LoopServer`: the loop's side of a server. `BaseServer` derives from it; a mix-in puts it before another class.

The hooks of a request are called in `socketserver`'s order: `_handle_request_noblock`, `get_request`,
`verify_request`, `process_request`, `finish_request`, the handler's `setup`, `handle`, `finish`, then
`shutdown_request`, `close_request`. For state and async handlers, the engine does the I/O: after `process_request` only
`close_request` is called, once the connection has ended.

Three things differ from `socketserver`: one loop serves all requests, `shutdown` works at once and from anywhere, and
`handle_error` uses `logging`.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from functools import partial
from math import inf
from types import FunctionType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from reqtable.config import Config
from reqtable.dispatch.checks import is_resumable
from reqtable.dispatch.handoff import HandedOffRequest
from reqtable.dispatch.policies.greenlet import defer_handshakes
from reqtable.dispatch.run_blocking import runs_concurrently
from reqtable.net.listener import listening_timeout, set_keepalive
from reqtable.net.sockets import INTERNET
from reqtable.server.configured import ConfiguredServer
from reqtable.server.drain import Drain
from reqtable.server.engine import Engine
from reqtable.table.errors import ReqtableError
from reqtable.table.states import State
from reqtable.table.table import Entry, RequestTable

_LOOK_S = 0.05
_DONE = {State.LINGERING, State.CLOSED}
_METHODS = (FunctionType, classmethod, staticmethod)


T_co = TypeVar("T_co", covariant=True)


class _Shown(Generic[T_co]):
    """Shows a value of a server as an attribute. Unlike a property, it lets a program set its own under that name."""

    def __init__(self, read: Callable[[Any], T_co]) -> None:
        self._read = read
        self.__doc__ = read.__doc__

    def __get__(self, server: Any, owner: type) -> T_co:
        return self if server is None else self._read(server)  # type: ignore[return-value]


class LoopServer(ConfiguredServer):
    """Serves the requests of a server class in the loop of an engine.

    A program's subclass may use any attribute name that does not begin with an underscore, even `engine` or `table`:
    the package itself uses underscored names for these.
    """

    timeout: float | None

    _engine: Engine | None = None
    _in_serve_forever = False
    _kept_alive: tuple[Any, float | None] = (None, None)  # the socket on which keep-alive was set, and its time
    _is_left_non_blocking = False  # the listening socket: it was blocking before the loop used it
    _is_draining = False
    _owns_queue = False  # no other process and no other descriptor listens on the same socket
    _served_ahead = 0  # how many later calls of `handle_request` have nothing left to do

    # As `socketserver.BaseServer` names them: programs set and read them.
    _BaseServer__is_shut_down: threading.Event
    _BaseServer__shutdown_request: bool

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        owner = next(each for each in cls.__mro__ if "_handle_request_noblock" in vars(each))
        if not issubclass(owner, LoopServer):  # a whole server: its own loop would run, silently
            mixed = next(each for each in cls.__bases__ if hasattr(each, "dispatch") and not issubclass(each, owner))
            raise TypeError(
                f"{cls.__name__}: {mixed.__name__} comes after {owner.__name__}, whose loop it must replace: put it "
                f"first, as in class {cls.__name__}({mixed.__name__}, …)"
            )

    # -- the table ----------------------------------------------------------------------------------------------------

    @_Shown
    def engine(self) -> Engine:
        """The engine whose loop serves this server. Several servers may share one: `Engine().add(server)`."""
        return self._host

    @_Shown
    def table(self) -> RequestTable:
        """Every unfinished request of this server's engine."""
        return self._host.table

    @_Shown
    def config(self) -> Config:
        """The configuration by which this server serves new requests."""
        return self._policies.config

    @property
    def _host(self) -> Engine:
        if self._engine is None:
            name = type(self).__name__
            raise ReqtableError(f"{name}: the constructor of its server class was not called: call super().__init__(…)")
        return self._engine

    def _join(self, engine: Engine) -> None:
        """Move this server to `engine`. Raises ReqtableError if it has unfinished requests."""
        if self._engine is not None:
            if self._engine.has_requests(self):
                raise ReqtableError("a server with requests in its table can't change engines: add it before it serves")
            self._engine.discard(self)
        self._engine = engine
        if "_policies" in vars(self):  # else the constructor makes them, for this engine
            for policies in (self._policies, *self._former):
                policies.join(engine)
        engine.servers.append(self)

    @property
    def _begins_with_tls(self) -> bool:
        """Whether connections begin with a TLS handshake, so that nothing may be sent in the clear."""
        return self._preamble is not None and self._preamble.context is not None

    def _prepare(self) -> None:
        """Get ready to accept requests: set keep-alive, and see that accepting does not wait for TLS handshakes."""
        self._keep_alive()
        waits_elsewhere = not self._policies.chosen.blocking_holds_loop and not is_resumable(self.RequestHandlerClass)
        if waits_elsewhere:
            defer_handshakes()

    def _keep_alive(self) -> None:
        """Have the kernel probe silent clients after `keepalive_s`. Without that limit, leave the socket as it is."""
        told, before = self._kept_alive
        own, seconds = getattr(self, "socket", None), self._host.limits.keepalive_s
        if not isinstance(own, socket.socket) or own.family not in INTERNET or own.type != socket.SOCK_STREAM:
            return
        # Set it only once: workers share the socket, and a worker of an earlier configuration may start late.
        if own.fileno() >= 0 and (seconds != before or (own is not told and seconds is not None)):
            set_keepalive(own, seconds)
            self._kept_alive = own, seconds

    def _hook(self, name: str) -> Any:
        """Return the method `name` of a class in front of this one, or None.

        A class behind this one, such as a server class of `socketserver`, may use the name for itself.
        """
        mro = type(self).__mro__
        for each in mro[: mro.index(LoopServer)]:
            if name in vars(each):
                method = vars(each)[name]
                return method.__get__(self, type(self)) if isinstance(method, _METHODS) else None
        return None

    def stats(self) -> dict[str, Any]:
        """Return what has been counted since this server was made, as plain data: numbers, and dicts of numbers.

        `accepted` counts requests, `finished` how they ended (`done timeout limit reset upstream error cancelled
        drained moved`), `refused` which limit refused them. `bytes_in`, `bytes_out` and `steps` are sums over ended
        requests. `policies` has the same for each policy. `entries` is the number of requests now. `buffered_bytes`
        (now) and the times of the `loop` belong to the engine, which other servers may share.
        """
        table = self._host.table
        return {
            "entries": table.census.count_of(self),
            "buffered_bytes": table.buffered,
            **self._counts.plain(),
            "loop": self._host.loop.times.plain(),
        }

    # -- serving ------------------------------------------------------------------------------------------------------

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve until `shutdown()`, along with every other server of this engine.

        Before the first request, this calls `on_start()` of these servers and `on_start(server)` of their handler
        classes, and raises what they raise. After the last request it calls `on_stop`, and logs what that raises.

        The loop waits for events, not for `poll_interval` (seconds). The interval only bounds how long the loop takes
        to notice that a program has set the flag of `shutdown` by hand.
        """
        self._host.loop.must_be_idle()
        self._must_be_open()
        self._host_again()
        self._BaseServer__is_shut_down.clear()
        self._served_ahead = 0
        self._in_serve_forever = True
        try:
            engine = self._host
            engine.serve(lambda: engine.stopping or self._BaseServer__shutdown_request, poll_interval)
        finally:
            self._in_serve_forever = False
            self._BaseServer__shutdown_request = False
            self._BaseServer__is_shut_down.set()

    def shutdown(self) -> None:
        """Stop `serve_forever` at once, and wait until it has returned.

        In the loop's thread, from a handler or a signal handler, it does not wait: the loop stops after its pass.
        Called before `serve_forever`, it waits for that call, which returns at once. Requests stay in the table,
        suspended, until the next `serve_forever` or `server_close()`. Only if the loop ran outside the main thread, the
        requests of blocking handlers end with it, because their stacks can't change threads.
        """
        self._BaseServer__shutdown_request = True
        self._wait_for_end()

    def drain(self, timeout: float | None = None) -> None:
        """Serve only clients that have connected, until they are done or `timeout` seconds are over; then stop.

        Connections idle for `drain_idle_s` see end of file. Requests that are left in the end are ended as `drained`.
        If no loop runs, this method runs it. Otherwise it waits until the drain is over, unless it is called in the
        loop. Then `serve_forever` returns; another server's `serve_forever` on the same engine goes on.
        """
        engine = self._host
        drained = threading.Event()
        until = inf if timeout is None else engine.table.clock() + timeout
        drain = Drain(engine, [self], until, partial(self._drained, drained))
        running = engine.steps.running
        engine.post(drain.begin)
        if not running:
            engine.run(drained.is_set)
        elif not engine.steps.in_loop_thread:
            while engine.steps.running and not drained.wait(_LOOK_S):
                pass  # something else may stop the loop before it is drained
            self._wait_for_end()

    def handle_request(self) -> None:
        """Serve one request to its end, or call `handle_timeout()` if none comes in time.

        It calls neither `on_start` nor `on_stop`, which belong to `serve_forever`.

        As in `socketserver`, this does not wait for a thread or a child that has a blocking handler's request. If the
        class promises a thread or a child for each request, but the policy runs handlers on the loop, this serves other
        requests too, until all that have begun are done: nothing would run them after this returns. Each of them
        answers a later call, which returns at once. The time is the shorter of `timeout` and the socket's own timeout,
        in seconds. Raises ValueError after `server_close()`.
        """
        self._must_be_open()
        engine = self._host
        engine.loop.must_be_idle()
        self._host_again()
        if self._served_ahead:
            self._served_ahead -= 1
            return
        own = None if getattr(self, "socket", None) is None else listening_timeout(self)
        timeouts = [t for t in (own, self.timeout) if t is not None]
        until = engine.table.clock() + min(timeouts) if timeouts else None
        known = engine.table.last_id
        listener = engine.listeners.listen(self, most=1)
        engine.steps.failures.hooks_raise = True
        try:
            engine.run(lambda: listener.taken > 0, until=until)
            if not listener.taken:
                self.handle_timeout()
                return
            if not (self._policies.chosen.steps_on_loop and runs_concurrently(self)):
                engine.listeners.unlisten(self)
            engine.run(lambda: all(_is_over(each) for each in engine.table if each.id > known and each.server is self))
            self._served_ahead = listener.taken - 1
        finally:
            engine.steps.failures.hooks_raise = False
            engine.listeners.unlisten(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Enter the request into the table, under this server's policy. If there is no room, refuse it."""
        (self._engine or self._host).intake.admit(self, request, client_address)

    def _handle_request_noblock(self) -> bool:
        """Accept one waiting request. Returns whether another one may be waiting."""
        return (self._engine or self._host).intake.accept(self)

    def _drained(self, drained: threading.Event) -> None:
        self._BaseServer__shutdown_request = self._in_serve_forever
        drained.set()

    def _must_be_open(self) -> None:
        if self.fileno() < 0:
            raise ValueError(f"this {type(self).__name__} is closed: it has no socket to take requests from")

    def _host_again(self) -> None:
        """Host this server again after `server_close()`: some programs give a closed server a socket they inherited."""
        if self not in self._host.servers:
            self._make_policies_again()
            self._host.servers.append(self)

    def _wait_for_end(self) -> None:
        engine = self._host
        if engine.steps.running and not self._in_serve_forever:
            # Another server of the engine, or the engine itself, runs the loop: only stop listening for this one.
            engine.post(engine.listeners.unlisten, self)
            self._BaseServer__shutdown_request = False
            return
        engine.loop.poller.wake()
        # In a forked child, the loop is the parent's: nobody would set the event.
        if not engine.steps.in_loop_thread and not engine.loop.poller.is_copy:
            self._BaseServer__is_shut_down.wait()

    def _end_requests(self) -> None:
        """Stop listening, wait for requests of threads and children if `block_on_close`, and end all other requests."""
        if self._in_serve_forever:
            self._BaseServer__shutdown_request = True
        if self._engine is None:
            return
        if self._engine.loop.poller.is_copy:
            self._engine.loop.start_over()  # the requests are the parent's
        self._engine.listeners.unlisten(self)
        if getattr(self, "socket_type", None) == socket.SOCK_STREAM and hasattr(self, "socket"):
            self.socket.close()  # frees the port while we wait
        wait = getattr(self, "block_on_close", True)
        policy_sets = (self._policies, *self._former)
        for policies in policy_sets if wait else ():
            policies.wait()
        self._policies.run_posted()
        for policies in policy_sets:
            policies.let_go()
        self._engine.discard(self)
        for policies in policy_sets:
            policies.close(wait)

    if TYPE_CHECKING:  # attributes of the server class behind this one, `socketserver`'s or ours
        RequestHandlerClass: Callable[..., Any]
        server_address: Any
        socket: socket.socket

        def fileno(self) -> int: ...
        def get_request(self) -> tuple[Any, Any]: ...
        def verify_request(self, request: Any, client_address: Any) -> bool: ...
        def finish_request(self, request: Any, client_address: Any) -> None: ...
        def shutdown_request(self, request: Any) -> None: ...
        def close_request(self, request: Any) -> None: ...
        def handle_error(self, request: Any, client_address: Any) -> None: ...
        def handle_timeout(self) -> None: ...
        def service_actions(self) -> None: ...
        def server_close(self) -> None: ...


def _is_over(entry: Entry) -> bool:
    """Return whether `handle_request` may return: `entry` has ended, or a thread or child serves it to its end."""
    transport = entry.transport
    return entry.state in _DONE or (isinstance(transport, HandedOffRequest) and transport.ends_itself)
