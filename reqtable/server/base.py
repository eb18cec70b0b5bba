"""`LoopServer`: the loop's side of a server. `BaseServer` is built on it; a mix-in puts it in front of another class.

The hooks of one request are called in `socketserver`'s order: `_handle_request_noblock`, `get_request`,
`verify_request`, `process_request`, `finish_request`, the handler's `setup`, `handle`, `finish`, then
`shutdown_request`, `close_request`. The I/O of a state or async handler is the engine's: for one, `process_request` is
followed by `close_request`, once its connection has ended. What differs is the loop (one, for all requests),
`shutdown` (at once, from anywhere), and `handle_error` (through `logging`).
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from reqtable.dispatch.checks import is_resumable
from reqtable.dispatch.forking.run_blocking import runs_concurrently
from reqtable.dispatch.handoff import Handoff
from reqtable.dispatch.policies.greenlet import defer_handshakes
from reqtable.net.listener import listening_timeout, set_keepalive
from reqtable.net.stream import INTERNET
from reqtable.server.configured import ConfiguredServer
from reqtable.server.drain import Drain
from reqtable.server.engine import Engine
from reqtable.table.errors import ReqtableError
from reqtable.table.states import State
from reqtable.table.table import Entry, RequestTable

_LOOK_S = 0.05
_DONE = {State.LINGERING, State.CLOSED}


T_co = TypeVar("T_co", covariant=True)


class _Shown(Generic[T_co]):
    """What a server shows of itself. Unlike a property's, its name is free for a program's own attribute."""

    def __init__(self, read: Callable[[Any], T_co]) -> None:
        self._read = read
        self.__doc__ = read.__doc__

    def __get__(self, server: Any, owner: type) -> T_co:
        return self if server is None else self._read(server)  # type: ignore[return-value]


class LoopServer(ConfiguredServer):
    """The loop's side of a server.

    A program's own server may have any attribute that does not begin with an underscore, even one of the names here:
    what is needed inside goes by others.
    """

    timeout: float | None

    _engine: Engine | None = None
    _in_serve_forever = False
    _kept_alive: tuple[Any, float | None] = (None, None)  # the socket that was told of keep-alive, and of what time
    _is_left_non_blocking = False  # its listening socket, which blocked before it was listened on
    _owns_queue = False  # nobody else listens on its socket, in another process or by another descriptor
    _served_ahead = 0  # requests for which a later `handle_request` has nothing left to do

    # As `socketserver.BaseServer` names them: programs set and read them.
    _BaseServer__is_shut_down: threading.Event
    _BaseServer__shutdown_request: bool

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        owner = next(each for each in cls.__mro__ if "_handle_request_noblock" in vars(each))
        if not issubclass(owner, LoopServer):  # a whole server: it would be served by that one's loop, silently
            mixed = next(each for each in cls.__bases__ if hasattr(each, "dispatch") and not issubclass(each, owner))
            raise TypeError(
                f"{cls.__name__}: {mixed.__name__} comes after {owner.__name__}, whose loop it is to replace: put it "
                f"first, as in class {cls.__name__}({mixed.__name__}, …)"
            )

    # -- the table ----------------------------------------------------------------------------------------------------

    @_Shown
    def engine(self) -> Engine:
        """The loop. Several servers may share one: `Engine().add(server)`."""
        return self._host

    @_Shown
    def table(self) -> RequestTable:
        """Every unfinished request of this server's engine."""
        return self._host.table

    @property
    def _host(self) -> Engine:
        if self._engine is None:
            name = type(self).__name__
            raise ReqtableError(f"{name}: the constructor of its server class was not called: call super().__init__(…)")
        return self._engine

    def _join(self, engine: Engine) -> None:
        """Be hosted in that engine."""
        if self._engine is not None:
            if self._engine.has_requests(self):
                raise ReqtableError("a server with requests in its table can't change engines: add it before it serves")
            self._engine.discard(self)
        self._engine = engine
        for policies in (self._policies, *self._former):
            policies.join(engine)
        engine.servers.append(self)

    @property
    def _begins_with_tls(self) -> bool:
        """Whether nothing may be said to a client in the clear."""
        return self._preamble is not None and self._preamble.context is not None

    def _prepare(self) -> None:
        """Its requests are about to be taken: see that no TLS handshake of theirs is part of that."""
        self._keep_alive()
        waits_elsewhere = not self._policies.chosen.blocking_holds_loop and not is_resumable(self.RequestHandlerClass)
        if waits_elsewhere:
            defer_handshakes()

    def _keep_alive(self) -> None:
        """Have silent clients probed as the limits say. Without `keepalive_s` the socket is left as it is."""
        told, before = self._kept_alive
        own, seconds = getattr(self, "socket", None), self._host.limits.keepalive_s
        if not isinstance(own, socket.socket) or own.family not in INTERNET or own.type != socket.SOCK_STREAM:
            return
        # Told once: workers share the socket, and one of an earlier configuration may begin late.
        if own.fileno() >= 0 and (seconds != before or (own is not told and seconds is not None)):
            set_keepalive(own, seconds)
            self._kept_alive = own, seconds

    def stats(self) -> dict[str, Any]:
        """What has been counted since this server was made, as plain data: numbers, and dicts of numbers.

        `accepted` requests, `finished` by how they ended (`done timeout limit reset error cancelled drained`),
        `refused` by the limit; `bytes_in`, `bytes_out` and `steps` of those that have ended; the same for each of its
        `policies`; `entries` now; and of the engine, which it may share: `buffered_bytes` now, the times of its `loop`.
        """
        table = self._host.table
        return {
            "entries": sum(entry.server is self for entry in table),
            "buffered_bytes": table.buffered,
            **self._counts.plain(),
            "loop": self._host.loop.times.plain(),
        }

    # -- serving ------------------------------------------------------------------------------------------------------

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve until `shutdown()`, with every other server of this engine.

        The loop waits for events, not for `poll_interval` (seconds): it only bounds how long it takes to notice that
        someone set the flag of `shutdown` by hand.
        """
        self._host.loop.must_be_idle()
        self._must_be_open()
        self._host_again()
        self._BaseServer__is_shut_down.clear()
        self._served_ahead = 0
        self._in_serve_forever = True
        try:
            self._host.serve(lambda: self._BaseServer__shutdown_request, poll_interval)
        finally:
            self._in_serve_forever = False
            self._BaseServer__shutdown_request = False
            self._BaseServer__is_shut_down.set()

    def shutdown(self) -> None:
        """End `serve_forever`, at once, and wait until it has ended.

        From a handler, or a signal handler in the loop's thread, it does not wait: the loop ends with its pass. Called
        before `serve_forever`, it waits for one, which ends at once. Requests in the table stay there, suspended, until
        the next `serve_forever` or `server_close()`; but those of blocking handlers, whose stacks can't change threads,
        end with a loop that runs in another thread than the main one.
        """
        self._BaseServer__shutdown_request = True
        self._wait_for_end()

    def drain(self, timeout: float | None = None) -> None:
        """Take those who have connected and no others, let them finish, for at most `timeout` seconds, then stop.

        Those that have been idle for `drain_idle_s` meet the end of their input meanwhile; those that are left in the
        end are ended, as `drained`. Where no loop runs, this runs it. Otherwise it waits until it is done, unless it is
        called in the loop. Then `serve_forever` ends; where another server of the engine serves, that goes on.
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
                pass  # someone may end the loop before it is drained
            self._wait_for_end()

    def handle_request(self) -> None:
        """Serve one request, to its end, or call `handle_timeout()` when none comes in time.

        A thread or a child that has the request of a blocking handler is not waited for, as in `socketserver`. Where
        the class would have one and the policy has not, others are served until all that have begun are done, because
        nobody would go on with them after this returns; each of them is worth a later call, which returns at once.
        The time is the shorter one of `timeout` and the socket's own timeout, in seconds. Raises ValueError after
        `server_close()`.
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
        """Enter the request into the table, under this server's policy; one for which there is no room is refused."""
        (self._engine or self._host).intake.admit(self, request, client_address)

    def _handle_request_noblock(self) -> bool:
        """Take a request that is there; True where there may be another."""
        return (self._engine or self._host).intake.accept(self)

    def _drained(self, drained: threading.Event) -> None:
        self._BaseServer__shutdown_request = self._in_serve_forever
        drained.set()

    def _must_be_open(self) -> None:
        if self.fileno() < 0:
            raise ValueError(f"this {type(self).__name__} is closed: it has nothing to take requests from")

    def _host_again(self) -> None:
        """After `server_close()`: some programs give a closed server another socket, one that they have inherited."""
        if self not in self._host.servers:
            self._make_policies_again()
            self._host.servers.append(self)

    def _wait_for_end(self) -> None:
        engine = self._host
        if engine.steps.running and not self._in_serve_forever:
            # another server of the engine, or the engine itself, serves: only this one's listening ends
            engine.post(engine.listeners.unlisten, self)
            self._BaseServer__shutdown_request = False
            return
        engine.loop.poller.wake()
        if (
            not engine.steps.in_loop_thread and not engine.loop.poller.is_copy
        ):  # in a forked child, the loop is the parent's
            self._BaseServer__is_shut_down.wait()

    def _end_requests(self) -> None:
        """Take nothing new; wait for what threads and children have, if `block_on_close`; end every other request."""
        if self._in_serve_forever:
            self._BaseServer__shutdown_request = True
        if self._engine is None:
            return
        if self._engine.loop.poller.is_copy:
            self._engine.loop.start_over()  # the requests are the parent's
        self._engine.listeners.unlisten(self)
        if getattr(self, "socket_type", None) == socket.SOCK_STREAM and hasattr(self, "socket"):
            self.socket.close()  # its port is free while we wait
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

    if TYPE_CHECKING:  # what the server class behind this one has, be it `socketserver`'s or ours
        RequestHandlerClass: Any
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
    """For `handle_request`: also where a thread or a child serves it to its very end, as under `socketserver`."""
    transport = entry.transport
    return entry.state in _DONE or (isinstance(transport, Handoff) and transport.ends_itself)
