"""`PolicySet`: the policies and the executors of one server under one configuration, each made when first needed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import Any, Protocol
from weakref import ref

# With the package, and not when a server first needs the policy: the module `greenlet` says why.
import reqtable.dispatch.policies.executor
import reqtable.dispatch.policies.inline
import reqtable.dispatch.policies.pool  # noqa: F401
from reqtable.config import Config
from reqtable.dispatch.checks import check_servable
from reqtable.dispatch.executors import Executors
from reqtable.dispatch.handoff import Handoff
from reqtable.dispatch.policies.fork import Fork
from reqtable.dispatch.policy import Policy
from reqtable.dispatch.registry import policy_named
from reqtable.dispatch.remote_steps import ByState
from reqtable.loop.platform import SYSTEM, System
from reqtable.loop.step import Steps
from reqtable.table.errors import ConfigurationError
from reqtable.table.parts import Resumable
from reqtable.table.snapshot import unwrapped
from reqtable.table.table import Entry
from reqtable.table.wants import Call, Want


class Engine(Protocol):
    """What a policy set needs of the engine that hosts its server."""

    system: System
    steps: Steps

    def abandon(self, own: Entry | None) -> None:
        """In a forked child: close this process's copies of all descriptors, but for the socket of `own`."""


class PolicySet:
    """The policy `name` of `server`, and what its handlers ask for beside it. Raises ConfigurationError.

    `engine` is the engine that hosts the server; None: the server joins one later.
    """

    steps: Steps  # what steps the requests of the server's engine

    def __init__(self, server: Any, engine: Engine | None, name: str, config: Config) -> None:
        self._engine = engine
        if engine is not None:
            self.steps = engine.steps
        self.server = server
        self.config = config
        self.requests = 0  # that it admitted and that have not ended
        self.is_former = False  # another configuration has taken its place: it goes with its last request
        self._child_steps: Steps | None = None
        self._policies: dict[str, Policy] = {}
        self.executors = Executors(self)
        self._lock = threading.Lock()  # the drivers of other threads come here too
        try:
            self.executors.make_configured()
            self.chosen = self.policy(name)
        except BaseException:
            self.close(wait=False)
            raise

    def check(self, handler_class: Any) -> None:
        """Raise ConfigurationError where handlers of that class can't run so, with the reason."""
        check_servable(handler_class, self.server)
        self.chosen.check(handler_class)
        for name, pinned in _pins(handler_class).items():
            place = f"{unwrapped(handler_class).__name__}.{name}: @state(dispatch={pinned!r})"
            try:
                policy = self.policy(pinned)
                policy.check_step(handler_class)
            except ConfigurationError as error:
                raise ConfigurationError(f"{place}: {error}") from error
            if policy.steps_on_loop and self.chosen.takes_whole_requests:
                raise ConfigurationError(
                    f"{place} runs on the loop, but dispatch policy {self.chosen.name!r} runs whole requests "
                    "elsewhere: choose 'inline' or 'pool'"
                )

    def join(self, engine: Engine) -> None:
        """The server is hosted by `engine` from here on."""
        self._engine = engine
        self.steps = engine.steps

    @property
    def watching(self) -> Steps:
        """Whose loop children are watched in: the engine's, or, in a child, that of its one request."""
        return self._child_steps or self.steps

    def watch_in(self, steps: Steps) -> None:
        """In a child: watch children of its own in the loop of its one request."""
        self._child_steps = steps

    @property
    def _system(self) -> System:
        return SYSTEM.get() if self._engine is None else self._engine.system

    def policy(self, name: str) -> Policy:
        """The policy of that name, for this server."""
        with self._lock:
            policy = self._policies.get(name)
        if policy is None:
            possible = self._system.policies
            if possible is not None and name not in possible:
                raise ConfigurationError(f"policy {name!r} can't be simulated: {', '.join(sorted(possible))} can")
            made = policy_named(name)(self)
            with self._lock:
                policy = self._policies.setdefault(name, made)
        return policy

    def adopt(self, entry: Entry, pid: int, pidfd: int) -> Want[Any]:
        """A child that the handler has forked has the rest of `entry`. Returns what to wait for."""
        return self.forking.adopt(entry, pid, pidfd)

    @property
    def forking(self) -> Fork:
        """The policy `fork`, which watches every child that has a request."""
        policy = self.policy("fork")
        assert isinstance(policy, Fork)
        return policy

    # -- what runs a handler ------------------------------------------------------------------------------------------

    def resumable(self, entry: Entry, handler: Any, policy: Policy | None) -> Resumable:
        """What runs `handler` under `policy`, but for the states that say where they run; None: on the spot."""
        default: Resumable = handler if policy is None else policy.resumable(entry, handler)
        pins = handler._pinned
        if not pins:
            return default
        return ByState(
            handler, default, {name: self.policy(pin).stepping(entry, handler) for name, pin in pins.items()}
        )

    # -- what runs a function -----------------------------------------------------------------------------------------

    def executor(self, name: str) -> Executor:
        """The executor that `call(on=name)` means. Raises ConfigurationError where there is none."""
        return self.executors.named(name)

    def begin_call(self, entry: Entry, want: Call[Any]) -> Callable[[], Any]:
        """Run what a `call` asks for and have its result delivered. Returns what gives it up."""
        return self.executors.begin_call(entry, want)

    def threads(self, most: int, name: str) -> Executor:
        """An executor of that many threads, for which the interpreter's exit waits unless they are daemons."""
        kind, server = type(self.server), ref(self.server)  # idle threads shall not keep a server that is dropped
        return self._system.executor(most, name, lambda: bool(getattr(server() or kind, "daemon_threads", False)))

    @property
    def daemon_threads(self) -> bool:
        """Whether neither `server_close()` nor the interpreter's exit waits for threads of this server's."""
        return bool(getattr(self.server, "daemon_threads", False))

    # -- the end ------------------------------------------------------------------------------------------------------

    def ended(self) -> None:
        """One of its requests has ended."""
        self.requests -= 1
        if self.is_former and not self.requests:
            self.close(wait=False)

    def retire(self) -> None:
        """Another one takes its place; its requests end under it."""
        self.is_former = True
        if not self.requests:
            self.close(wait=False)

    def wait(self) -> None:
        """Wait until the requests that were taken over have ended."""
        for policy in self._policies.values():
            policy.wait()

    def let_go(self) -> None:
        """Who has a request goes on with it, though the server closes."""
        for entry in self.steps.table:
            if entry.server is self.server and isinstance(entry.transport, Handoff):
                entry.transport.is_let_go = True
        for policy in self._policies.values():
            policy.let_go()

    def close(self, wait: bool, calls: bool = False) -> None:
        """Give back what is held. With `wait`, steps that are out end first; with `calls`, calls too."""
        for policy in self._policies.values():
            policy.close(wait)
        self.executors.close(calls)

    def run_posted(self) -> None:
        """Call what was posted, where no loop runs that would."""
        engine = self._engine
        if engine is not None and not engine.steps.running and not engine.steps.poller.is_copy:
            engine.steps.mailbox.run_posts()
            engine.steps.reap()

    def leave_parent(self, own: Entry | None) -> None:
        """In a new child: close this process's copies of all descriptors but those of `own`."""
        engine = self._engine
        assert engine is not None
        private = {self.watching} if own is None else {self.watching, own.table.owner}
        for steps in private:
            if isinstance(steps, Steps) and steps is not engine.steps:
                steps.poller.close()
                steps.abandon(own)
        engine.abandon(own)

    def abandon(self) -> None:
        """In a forked child: what is the parent's stays the parent's; what is needed is made anew."""
        self._lock = threading.Lock()
        self.executors.abandon()
        for policy in self._policies.values():
            policy.abandon()


def _pins(handler_class: Any) -> Mapping[str, str]:
    """The states of a handler class that say where they run."""
    return getattr(unwrapped(handler_class), "_pinned", {})
