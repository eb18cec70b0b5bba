"""`PolicySet`: the policies and the executors of one server under one configuration."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import Any, Protocol
from weakref import ref

# Imported with the package, not when a server first needs the policy: `policies/greenlet.py` says why.
import reqtable.dispatch.policies.executor
import reqtable.dispatch.policies.inline
import reqtable.dispatch.policies.pool  # noqa: F401
from reqtable.config import Config
from reqtable.dispatch.checks import check_servable
from reqtable.dispatch.executors import Executors
from reqtable.dispatch.handoff import HandedOffRequest
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
from reqtable.table.want import Want
from reqtable.table.wants import Call


class Engine(Protocol):
    """Gives a policy set what it needs of the engine that hosts its server."""

    system: System
    steps: Steps

    def abandon(self, own: Entry | None) -> None:
        """In a forked child: close this process's copies of all descriptors, but for the socket of `own`."""


class PolicySet:
    """Makes the policy `name` of `server`, and the other policies and executors when its handlers first need them.

    `engine` hosts the server; None: the server joins one later. The constructor raises ConfigurationError.
    """

    steps: Steps  # steps the requests of the server's engine

    def __init__(self, server: Any, engine: Engine | None, name: str, config: Config) -> None:
        self._engine = engine
        if engine is not None:
            self.steps = engine.steps
        self.server = server
        self.config = config
        self.requests = 0  # how many requests this configuration admitted that have not ended
        self.is_former = False  # another configuration has replaced this one, which closes after its last request
        self._child_steps: Steps | None = None
        self._policies: dict[str, Policy] = {}
        self.executors = Executors(self)
        self._lock = threading.Lock()  # private loops in other threads use it too
        try:
            self.executors.make_configured()
            self.chosen = self.policy(name)
        except BaseException:
            self.close(wait=False)
            raise

    def check(self, handler_class: Any) -> None:
        """Raise ConfigurationError, with the reason, if handlers of that class can't run under these policies."""
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
        """Take `engine` as the engine that hosts the server from here on."""
        self._engine = engine
        self.steps = engine.steps

    @property
    def watching_steps(self) -> Steps:
        """The steps whose loop watches children: the engine's; in a child, those of its one request."""
        return self._child_steps or self.steps

    def watch_in(self, steps: Steps) -> None:
        """In a child: watch the child's own children in the loop of its one request."""
        self._child_steps = steps

    @property
    def _system(self) -> System:
        return SYSTEM.get() if self._engine is None else self._engine.system

    def policy(self, name: str) -> Policy:
        """Return this server's policy of that name. Raises ConfigurationError."""
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

    def made(self) -> list[Policy]:
        """Return the policies that were needed so far."""
        with self._lock:
            return list(self._policies.values())

    def adopt(self, entry: Entry, pid: int, pidfd: int) -> Want[Any]:
        """Watch the child `pid`, which the handler forked and which has the rest of `entry`. Returns the want."""
        return self.forking.adopt(entry, pid, pidfd)

    @property
    def forking(self) -> Fork:
        """The policy `fork`, which watches every child that has a request."""
        policy = self.policy("fork")
        assert isinstance(policy, Fork)
        return policy

    # -- what runs a handler ------------------------------------------------------------------------------------------

    def resumable(self, entry: Entry, handler: Any, policy: Policy | None) -> Resumable:
        """Return what runs `handler`: itself if `policy` is None. Pinned states run under the policies they name."""
        runs_itself = policy is None or handler._asks_policy
        default: Resumable = handler if runs_itself else policy.resumable(entry, handler)  # type: ignore[union-attr]
        pins = handler._pinned
        if not pins:
            return default
        return ByState(
            handler, default, {name: self.policy(pin).stepping(entry, handler) for name, pin in pins.items()}
        )

    # -- what runs a function -----------------------------------------------------------------------------------------

    def executor(self, name: str) -> Executor:
        """Return the executor that `call(on=name)` means. Raises ConfigurationError if there is none."""
        return self.executors.named(name)

    def begin_call(self, entry: Entry, want: Call[Any]) -> Callable[[], Any]:
        """Run the function of a `call` and have its result delivered. Returns a function that gives the call up."""
        return self.executors.begin_call(entry, want)

    def threads(self, most: int, name: str) -> Executor:
        """Make an executor of at most `most` threads. The interpreter's exit waits for them unless they are daemons."""
        kind, server = type(self.server), ref(self.server)  # so that idle threads don't keep a dropped server alive
        return self._system.executor(most, name, lambda: bool(getattr(server() or kind, "daemon_threads", False)))

    @property
    def daemon_threads(self) -> bool:
        """Whether `server_close()` and the interpreter's exit don't wait for this server's threads."""
        return bool(getattr(self.server, "daemon_threads", False))

    # -- the end ------------------------------------------------------------------------------------------------------

    def ended(self) -> None:
        """Note that a request of this configuration has ended."""
        self.requests -= 1
        if self.is_former and not self.requests:
            self.close(wait=False)

    def retire(self) -> None:
        """Close as soon as the requests of this configuration have ended, because another one replaces it."""
        self.is_former = True
        if not self.requests:
            self.close(wait=False)

    def wait(self) -> None:
        """Wait until the requests that were taken on have ended."""
        for policy in self._policies.values():
            policy.wait()

    def let_go(self) -> None:
        """Let threads and children go on with their requests after the server has closed."""
        for entry in self.steps.table:
            if entry.server is self.server and isinstance(entry.transport, HandedOffRequest):
                entry.transport.is_let_go = True
        for policy in self._policies.values():
            policy.let_go()

    def close(self, wait: bool, calls: bool = False) -> None:
        """Close the policies and executors. With `wait`, running steps return first; with `calls`, calls do too."""
        for policy in self._policies.values():
            policy.close(wait)
        self.executors.close(calls)

    def run_posted(self) -> None:
        """Call the posted functions, unless a running loop will."""
        engine = self._engine
        if engine is not None and not engine.steps.running and not engine.steps.poller.is_copy:
            while engine.steps.mailbox.posts:
                engine.steps.mailbox.run_posts()
            engine.steps.reap()

    def leave_parent(self, own: Entry | None) -> None:
        """In a new child: close this process's copies of all descriptors but those of `own`."""
        engine = self._engine
        assert engine is not None
        private = {self.watching_steps} if own is None else {self.watching_steps, own.table.owner}
        for steps in private:
            if isinstance(steps, Steps) and steps is not engine.steps:
                steps.poller.close()
                steps.abandon(own)
        engine.abandon(own)

    def abandon(self) -> None:
        """In a forked child: leave what is the parent's alone. Executors are made again when they are needed."""
        self._lock = threading.Lock()
        self.executors.abandon()
        for policy in self._policies.values():
            policy.abandon()


def _pins(handler_class: Any) -> Mapping[str, str]:
    """Return the pinned states of a handler class, each with the name of its policy."""
    return getattr(unwrapped(handler_class), "_pinned", {})
