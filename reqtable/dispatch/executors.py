"""`Executors`: what runs the functions of `call()`, for one server under one configuration."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from reqtable.config import ExecutorOptions
from reqtable.dispatch.calls import Calls, CallUnderway
from reqtable.dispatch.forking.child import keep
from reqtable.dispatch.policy import Host
from reqtable.dispatch.pools import ForkExecutor, RestartingPool, guarded
from reqtable.table.errors import ConfigurationError, HandlerError
from reqtable.table.table import Entry
from reqtable.table.wants import Call, Failure


class Executors:
    """Makes the executors that `call(on=…)` names, each when it is first needed, and runs calls in them."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.calls = Calls(host)
        self._executors: dict[str, Executor] = {}
        self._lock = threading.Lock()  # private loops in other threads use it too

    def make_configured(self) -> None:
        """Make the executors of the configuration. Raises ConfigurationError if one can't be made."""
        config = self._host.config
        for each in config.executors:
            self.named(each)
        if config.call_on not in self._known():
            place = config.origins.get("call_on", "")
            raise ConfigurationError(f"{place}{place and ': '}call_on: {self._no_executor(config.call_on)}")

    def named(self, name: str) -> Executor:
        """Return the executor of that name. Raises ConfigurationError if there is none."""
        with self._lock:
            executor = self._executors.get(name)
            if executor is None:
                executor = self._executors[name] = self._make(name)
            return executor

    def run_calls_by(self, make: Callable[[str], Executor]) -> None:
        """Replace every executor, including the configured ones, by what `make(name)` returns: for simulations."""
        for name in self._known():
            self._executors[name] = make(name)

    def begin_call(self, entry: Entry, want: Call[Any]) -> Callable[[], Any]:
        """Run the function of a `call` and have its result delivered. Returns a function that gives the call up."""
        name = want.on or self._host.config.call_on
        executor = self.named(name)
        is_sent = isinstance(executor, RestartingPool)  # perhaps to another process
        call = CallUnderway(entry, want, name)
        future = executor.submit(guarded, want.fn, want.args, want.kwargs) if is_sent else executor.submit(call.run)
        call.begun(future)
        number = entry.call_number
        owner = entry.table.owner
        assert owner is not None
        forget = self.calls.add(number, call)

        def post(done: Future[Any]) -> None:
            forget()
            if not call.is_given_up:
                owner.post_result(entry, number, _outcome(want, name, done, is_sent))

        future.add_done_callback(post)
        return call.give_up

    def close(self, wait: bool) -> None:
        """Shut the executors down. With `wait`, running calls return first."""
        while self._executors:
            self._executors.popitem()[1].shutdown(wait=wait, cancel_futures=True)

    def abandon(self) -> None:
        """In a forked child: leave the parent's executors alone. New ones are made when they are needed."""
        self._lock = threading.Lock()
        self.calls.abandon()
        for executor in self._executors.values():
            if isinstance(executor, RestartingPool | ForkExecutor):
                executor.abandon()
            keep(executor)
        self._executors.clear()

    def _make(self, name: str) -> Executor:
        config = self._host.config
        if name in config.executors:
            place = config.origins.get(f"executors.{name}.factory")
            return RestartingPool(f"executor {name!r}", config.executors[name], place)
        if name == "process":
            return RestartingPool('executor "process"', ExecutorOptions())
        if name not in ("thread", "fork"):
            raise ConfigurationError(self._no_executor(name))
        most = self._host.steps.table.limits.calls_max
        self.calls.bounded(name, most)
        return self._host.threads(most, "reqtable-call") if name == "thread" else ForkExecutor(self._host, most)

    def _known(self) -> list[str]:
        return ["thread", "process", "fork", *self._host.config.executors]

    def _no_executor(self, name: str) -> str:
        names = ", ".join(f'"{each}"' for each in self._known())
        return f"there is no executor {name!r}; there are {names}"


def _outcome(want: Call[Any], name: str, done: Future[Any], is_sent: bool) -> Any:
    if done.cancelled():  # a cluster does this to everything that it runs when its scheduler has gone
        return Failure(HandlerError(f"{want!r} was cancelled by its executor, {name!r}"))
    error = done.exception()
    if error is None:
        return done.result()
    if is_sent:
        error = _unfit(want) or error
        if type(error.__cause__).__name__ == "_RemoteTraceback":  # the notes have the user's part of that traceback
            error.__cause__ = None
    if not isinstance(error, Exception):  # a SystemExit, say: it ends the call, not the server
        error = HandlerError(f"{want!r} raised {error!r}")
    return Failure(error)


def _unfit(want: Call[Any]) -> HandlerError | None:
    """Return an error that names the part of a call that can't be pickled; None if all of it can."""
    named = {
        "its function": want.fn,
        **{f"its argument {each!r}": each for each in (*want.args, *want.kwargs.values())},
    }
    for name, each in named.items():
        try:
            pickle.dumps(each)
        except Exception as problem:
            mend = "define it at the top of a module" if each is want.fn else "pass plain data"
            return HandlerError(
                f"{want!r} can't be sent to another process: {name} can't be pickled ({problem}): {mend}, or pass "
                "on='thread'"
            )
    return None
