"""The interface of a dispatch policy, which decides where the steps of a request run.

A policy makes the `Resumable` that runs the handler of a request; the loop steps it. Some policies can also take on a
whole request. The loop, the table, the limits and the deadlines are the same under every policy.

An outside package registers a subclass of `Policy` under the entry point group `reqtable.dispatch`. All that it needs
can be imported from `reqtable.dispatch`.
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
from reqtable.table.want import Want
from reqtable.table.wants import Call, HandOff


class Host(Protocol):
    """Gives a policy what it may use of the server that it works for."""

    server: Any  # the program's own server, with whatever attributes its class has
    config: Config
    steps: Steps  # steps the requests of the server's engine; has its table, its mailbox and its limits
    requests: int  # how many requests this configuration admitted that have not ended

    @property
    def watching_steps(self) -> Steps:
        """The steps whose loop watches children: the engine's; in a child, those of its one request."""

    def watch_in(self, steps: Steps) -> None:
        """In a child: watch the child's own children in the loop of its one request."""

    def leave_parent(self, own: Entry | None) -> None:
        """In a new child: close this process's copies of all descriptors but those of `own`."""

    def close(self, wait: bool, calls: bool = False) -> None:
        """Close the policies and executors. With `wait`, running steps return first; with `calls`, calls do too."""

    @property
    def daemon_threads(self) -> bool:
        """Whether `server_close()` and the interpreter's exit don't wait for this server's threads."""

    def policy(self, name: str) -> Policy:
        """Return this server's policy of that name. Raises ConfigurationError."""

    def executor(self, name: str) -> Executor:
        """Return the executor that `call(on=name)` means. Raises ConfigurationError."""

    def threads(self, most: int, name: str) -> Executor:
        """Make an executor of at most `most` threads, which are named after `name`."""

    def resumable(self, entry: Entry, handler: Any, policy: Policy | None) -> Resumable:
        """Return what runs `handler`: itself if `policy` is None. Pinned states run under the policies they name."""

    def begin_call(self, entry: Entry, want: Call[Any]) -> Callable[[], Any]:
        """Run the function of a `call` and have its result delivered. Returns a function that gives the call up."""

    def adopt(self, entry: Entry, pid: int, pidfd: int) -> Want[Any]:
        """Watch the child `pid`, which the handler forked and which has the rest of `entry`. Returns the want."""

    def ended(self) -> None:
        """Note that a request of this configuration has ended."""

    def run_posted(self) -> None:
        """Call the posted functions, unless a running loop will."""


class Policy(ABC):
    """Decides where the steps of one server's requests run. `name` is what `dispatch=` calls the policy.

    The constructor raises ConfigurationError if the policy can't work with the configuration.
    """

    name: ClassVar[str]
    steps_on_loop: ClassVar[bool] = True  # handlers run in the loop's own thread
    takes_whole_requests: ClassVar[bool] = False  # a request runs elsewhere from its first step on
    forks: ClassVar[bool] = False  # a request runs in a process of its own
    blocking_holds_loop: ClassVar[bool] = False  # a blocking handler that waits holds up all other requests

    def __init__(self, host: Host) -> None:
        self.host = host

    @classmethod
    def check(cls, handler_class: Any) -> None:
        """Raise ConfigurationError, with the reason, if handlers of that class can't run under this policy."""

    @classmethod
    def check_step(cls, handler_class: Any) -> None:
        """Check the same for single steps, which `@state(dispatch=…)` pins to this policy."""
        cls.check(handler_class)

    # -- what runs a handler ------------------------------------------------------------------------------------------

    @abstractmethod
    def blocking(self, entry: Entry, transport: PollOnly) -> Resumable:
        """Return what runs a blocking handler, by calling `run(entry, transport)` of `reqtable.dispatch`."""

    def resumable(self, entry: Entry, handler: Any) -> Resumable:
        """Return what runs a resumable handler: the handler itself if its steps run on the loop."""
        return self.stepping(entry, handler)

    def stepping(self, entry: Entry, handler: Any) -> Resumable:
        """Return what runs single steps of a resumable handler while the loop does the I/O."""
        return handler  # type: ignore[no-any-return]

    def take_on(self, entry: Entry) -> Want[Any]:
        """Take on the rest of a request. Returns the want that the entry waits for until the request is done."""
        raise ConfigurationError(
            f"policy {self.name!r} can't take on a request: hand it off to 'thread', 'pool' or 'fork'"
        )

    # -- a request comes in -------------------------------------------------------------------------------------------

    def transport_for(self, request: Any) -> PollOnly:
        """Make the transport of a blocking handler's request."""
        if isinstance(request, socket.socket):
            send_at_once(request)  # http.server, for one, writes the headers and the body of an answer separately
        return PollOnly(self.host.steps, request)

    def secured(self, entry: Entry, request: Any, context: Any) -> Any:
        """Make the TLS socket of a request. The engine does the handshake afterwards."""
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

    def begin(self, entry: Entry) -> None:
        """Run the first steps of a request that has just entered the table."""
        self.host.steps.begin(entry)

    # -- what an entry and the engine call ----------------------------------------------------------------------------

    def begin_call(self, entry: Entry, want: Call[Any]) -> Callable[[], Any]:
        """Run a call elsewhere and have its result delivered. Returns a function that gives the call up."""
        return self.host.begin_call(entry, want)

    def hand_off(self, entry: Entry, want: HandOff) -> Want[Any]:
        """Have another policy take on the request. Returns the want to wait for."""
        return self.host.policy(want.policy).take_on(entry)

    def admitted(self) -> None:
        """Note that a request of this policy has entered the table."""
        self.host.requests += 1

    def released(self) -> None:
        """Note that a request of this policy has left the table."""
        self.host.ended()

    # -- the end ------------------------------------------------------------------------------------------------------

    def wait(self) -> None:
        """Wait until the requests that this policy took on have ended."""

    def let_go(self) -> None:
        """Let the requests that this policy took on go on after the server has closed."""

    def close(self, wait: bool) -> None:
        """Free what the policy holds. With `wait`, running steps return first."""

    def abandon(self) -> None:
        """In a forked child: drop what the parent's policy holds, without disturbing the parent."""
