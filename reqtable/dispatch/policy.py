"""What a dispatch policy is: where the steps of a request run.

A policy makes what runs the handler of a request: a `Resumable`, which the loop steps. Some policies can also take a
whole request over. The loop, the table, the limits and the deadlines are the same under every policy.

An outside package registers a policy under the entry point group `reqtable.dispatch`; its value is a subclass of
`Policy`. What such a policy needs is in `reqtable.dispatch`, and nowhere else.
"""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, ClassVar, Protocol

from reqtable.config import Config
from reqtable.dispatch.checks import is_resumable
from reqtable.loop.step import Steps
from reqtable.net.poll_only import PollOnly
from reqtable.net.stream import send_at_once
from reqtable.table.errors import ConfigurationError, HandlerError
from reqtable.table.parts import Resumable
from reqtable.table.places import place_of
from reqtable.table.table import Entry
from reqtable.table.wants import Call, HandOff, Want


class Host(Protocol):
    """What a policy may ask of the server that it works for."""

    server: Any  # the program's own, with whatever attributes its class has
    config: Config
    steps: Steps  # what steps the requests of the server's engine: its table, its mailbox, its limits
    requests: int  # that this configuration admitted and that have not ended

    @property
    def watching(self) -> Steps:
        """Whose loop children are watched in: the engine's, or, in a child, that of its one request."""

    def watch_in(self, steps: Steps) -> None:
        """In a child: watch children of its own in the loop of its one request."""

    def leave_parent(self, own: Entry | None) -> None:
        """In a new child: close this process's copies of all descriptors but those of `own`."""

    def close(self, wait: bool, calls: bool = False) -> None:
        """Give back what is held. With `wait`, steps that are out end first; with `calls`, calls too."""

    @property
    def daemon_threads(self) -> bool:
        """Whether neither `server_close()` nor the interpreter's exit waits for threads of this server's."""

    def policy(self, name: str) -> Policy:
        """The policy of that name, for this server. Raises ConfigurationError."""

    def executor(self, name: str) -> Executor:
        """The executor that `call(on=name)` means. Raises ConfigurationError."""

    def threads(self, most: int, name: str) -> Executor:
        """An executor of that many threads, of its own."""

    def resumable(self, entry: Entry, handler: Any, policy: Policy | None) -> Resumable:
        """What runs `handler` under `policy`, but for the states that say where they run; None: on the spot."""

    def begin_call(self, entry: Entry, want: Call[Any]) -> Callable[[], Any]:
        """Run what a `call` asks for and have its result delivered. Returns what gives it up."""

    def adopt(self, entry: Entry, pid: int, pidfd: int) -> Want[Any]:
        """A child that the handler has forked has the rest of `entry`. Returns what to wait for."""

    def ended(self) -> None:
        """One of its requests has ended."""

    def run_posted(self) -> None:
        """Call what was posted, where no loop runs that would."""


class Policy(ABC):
    """Where the steps of the requests of one server run. `name` is what `dispatch=` calls it.

    Its constructor raises ConfigurationError for a configuration that it can't work with.
    """

    name: ClassVar[str]
    steps_on_loop: ClassVar[bool] = True  # handlers run in the loop's own thread
    takes_whole_requests: ClassVar[bool] = False  # a request runs elsewhere from its first step on
    blocking_holds_loop: ClassVar[bool] = False  # a blocking handler that waits holds up all others

    def __init__(self, host: Host) -> None:
        self.host = host

    @classmethod
    def check(cls, handler_class: Any) -> None:
        """Raise ConfigurationError where handlers of that class can't run under this policy, with the reason."""

    @classmethod
    def check_step(cls, handler_class: Any) -> None:
        """The same for a single step, which `@state(dispatch=…)` pins to this policy."""
        cls.check(handler_class)

    # -- what runs a handler ------------------------------------------------------------------------------------------

    @abstractmethod
    def blocking(self, entry: Entry, transport: PollOnly) -> Resumable:
        """What runs a blocking handler: somewhere in it, `run(entry, transport)` of `reqtable.dispatch`."""

    def resumable(self, entry: Entry, handler: Any) -> Resumable:
        """What runs a resumable handler; the handler itself where its steps run on the loop."""
        return self.stepping(entry, handler)

    def stepping(self, entry: Entry, handler: Any) -> Resumable:
        """What runs single steps of a resumable handler while the loop does the I/O."""
        return handler  # type: ignore[no-any-return]

    def take_over(self, entry: Entry) -> Want[Any]:
        """Take over the rest of a request. Returns what the entry waits for until it is done."""
        raise ConfigurationError(f"policy {self.name!r} can't take over a request: hand it off to 'thread' or 'fork'")

    # -- a request comes in -------------------------------------------------------------------------------------------

    def transport_for(self, request: Any) -> PollOnly:
        """The transport of a blocking handler's request."""
        if isinstance(request, socket.socket):
            send_at_once(request)  # http.server writes the headers and the body of an answer one after the other
        return PollOnly(self.host.steps, request)

    def secured(self, entry: Entry, request: Any, context: Any) -> Any:
        """The TLS socket of a request whose handshake is about to be done."""
        blocking = not is_resumable(entry.server.RequestHandlerClass)
        return context.wrap_socket(
            request, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=blocking
        )

    def attach(self, entry: Entry) -> None:
        """Make what runs the handler of `entry`. Raises what the handler's constructor raises."""
        if isinstance(entry.transport, PollOnly):
            entry.resumable = self.blocking(entry, entry.transport)
            return
        entry.handler = handler = entry.server.RequestHandlerClass(entry)
        if getattr(handler, "entry", None) is None:
            name, place = type(handler).__name__, place_of(type(handler).__init__)
            raise HandlerError(f"{name}.__init__ does not call super().__init__(entry) ({place})")
        entry.resumable = self.host.resumable(entry, handler, self)

    # -- what an entry and the engine call ----------------------------------------------------------------------------

    def begin_call(self, entry: Entry, want: Call[Any]) -> Callable[[], Any]:
        """Run a call elsewhere and have its result delivered. Returns what gives it up."""
        return self.host.begin_call(entry, want)

    def hand_off(self, entry: Entry, want: HandOff) -> Want[Any]:
        """Have another policy take the request over. Returns what to wait for."""
        return self.host.policy(want.policy).take_over(entry)

    def admitted(self) -> None:
        """A request of its own has entered the table."""
        self.host.requests += 1

    def released(self) -> None:
        """A request of its own has left the table."""
        self.host.ended()

    # -- the end ------------------------------------------------------------------------------------------------------

    def wait(self) -> None:
        """Wait until the requests that it has taken over have ended."""

    def let_go(self) -> None:
        """Those that have not ended go on by themselves."""

    def close(self, wait: bool) -> None:
        """Give back what the policy holds; with `wait`, steps that are out end first."""

    def abandon(self) -> None:
        """In a forked child: give up what was the parent's, without touching what the parent still uses."""
