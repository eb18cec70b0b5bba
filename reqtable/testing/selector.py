"""The selector, the wake-up and the executor of a simulated network. Simulated time passes in the selector's poll."""

from __future__ import annotations

import selectors
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from functools import partial
from math import inf
from typing import Any

from reqtable.loop.wakeup import Wakeup
from reqtable.table.states import PEER_END, READ, RESET, WRITE
from reqtable.testing.kernel import File
from reqtable.testing.wires import Network

_LATE_MS = 50
_STALL_S = 100
_CALL_MS = 200


class SimSelector(selectors.BaseSelector):
    """Reports ready descriptors in an order that the seed chooses, with false and missing reports.

    A poll lets simulated time pass until a descriptor is ready. Raises RuntimeError if a registered descriptor was
    closed.
    """

    interests = READ | WRITE | RESET | PEER_END

    def __init__(self, network: Network) -> None:
        self._network = network
        self._keys: dict[int, selectors.SelectorKey] = {}
        self._files: dict[int, File] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        fd = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        if fd in self._keys:
            raise KeyError(f"{fd} is already registered")
        if not events or events & ~self.interests:
            raise ValueError(f"invalid events: {events!r}")
        self._files[fd] = self._network.file(fd)
        key = self._keys[fd] = selectors.SelectorKey(fileobj, fd, events, data)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        fd = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        if fd not in self._keys:
            raise KeyError(f"{fd} is not registered")
        del self._files[fd]
        return self._keys.pop(fd)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys

    def close(self) -> None:
        self._keys.clear()
        self._files.clear()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        network = self._network
        clock, dice = network.clock, network.dice
        clock.jump(network.latency_s / 10)  # the pass before took some time
        if dice.happens("stalled", "poll"):
            network.was_stalled = True
            clock.jump(1 + dice.draw("stalled for", "poll", _STALL_S))
        network.closed_before_pass = network.closed
        until = inf if timeout is None else clock.now + max(0.0, timeout)
        while True:
            network.happen()
            ready = self._ready()
            if ready or clock.now >= until:
                return self._reported(ready)
            at = min(network.next_at(), until)
            if at == inf or (network.next_at() == inf and network.is_over()):
                if network.on_quiet is None:
                    raise RuntimeError("the poll would last for ever: nothing is on its way")
                network.on_quiet()
                return []
            if dice.happens("early", "poll"):
                clock.now += max(0.0, at - clock.now) * dice.draw("early by", "poll", 1000) / 1000
                return self._reported([])
            if at == until and dice.happens("late", "poll"):
                until += (1 + dice.draw("late by", "poll", _LATE_MS)) / 1000
                continue
            clock.now = max(clock.now, at)

    def _ready(self) -> list[tuple[int, int]]:
        """Return each ready descriptor and the events that it is ready for."""
        files = self._network.files
        found = []
        for fd, key in self._keys.items():
            file = files.get(fd)
            if file is not self._files[fd]:
                raise RuntimeError(f"descriptor {fd} was closed while the selector watched it for {key.data!r}")
            mask = (file.ready() & key.events) | file.failed()
            if mask:
                found.append((fd, mask))
        return found

    def _reported(self, ready: list[tuple[int, int]]) -> list[tuple[selectors.SelectorKey, int]]:
        """Leave out some ready descriptors, add some that are not ready, and shuffle the result."""
        dice = self._network.dice
        masks = {fd: mask for fd, mask in ready if not dice.happens("withheld", "poll")}
        for fd, key in self._keys.items():
            false = key.events & (
                READ | WRITE
            )  # the kernel reports no false errors, nor a connection that is not there
            may_lie = fd not in masks and false and not self._files[fd].is_connecting
            if may_lie and dice.happens("spurious", "poll"):
                masks[fd] = false
        order = sorted((dice.draw("order", "poll", 2**32), fd) for fd in masks)
        return [(self._keys[fd], masks[fd]) for _, fd in order]


class SimWakeup(Wakeup):
    """Wakes a loop on a simulated network. Takes one descriptor."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._file = _Signal(network)
        self._fd = network.open(self._file)

    def fileno(self) -> int:
        return self._fd

    def wake(self) -> None:
        self._file.is_set = True

    def on_ready(self, mask: int) -> None:
        self._file.is_set = False

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        yield  # a simulated poll never waits, so a signal need not wake it

    def close(self) -> None:
        self._network.close(self._fd)


class _Signal(File):
    is_set = False

    def ready(self) -> int:
        return READ if self.is_set else 0


class SimExecutor(Executor):
    """Runs calls and pooled steps in the order they came in, `most` at a time. Each takes some simulated time."""

    def __init__(self, network: Network, most: int, name: str, may_leave: object) -> None:
        self._network = network
        self._most = most
        self._name = name
        self._waiting: list[_Task] = []  # the first `most` of them run
        self._is_over = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if self._is_over:
            raise RuntimeError("cannot schedule new futures after shutdown")
        task = _Task(Future(), lambda: fn(*args, **kwargs))
        self._waiting.append(task)
        if len(self._waiting) <= self._most:
            self._begin(task)
        return task.future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._is_over = True
        for task in list(self._waiting):
            if cancel_futures:
                task.future.cancel()
            if wait or cancel_futures:
                self._run(task)
                self._end(task)

    def _begin(self, task: _Task) -> None:
        self._network.after(self._network.dice.draw("call", self._name, _CALL_MS) / 1000, self._run, task)

    def _run(self, task: _Task) -> None:
        """Run a task. If it blocks, as a slow name look-up does, its result comes later."""
        if task not in self._waiting or task.tell is not None:
            return
        blocked_s = task.run(self._network)
        if blocked_s:
            self._network.after(blocked_s, self._end, task)
        else:
            self._end(task)

    def _end(self, task: _Task) -> None:
        if task not in self._waiting:
            return
        self._waiting.remove(task)
        if len(self._waiting) >= self._most:
            self._begin(self._waiting[self._most - 1])
        assert task.tell is not None
        task.tell()


class _Task:
    def __init__(self, future: Future[Any], work: Callable[[], Any]) -> None:
        self.future = future
        self._work = work
        self.tell: Callable[[], Any] | None = None  # tells the outcome; None: it has not run

    def run(self, network: Network) -> float:
        """Run the task, unless it was cancelled, and return for how many seconds it blocked."""
        if not self.future.set_running_or_notify_cancel():
            self.tell = bool
            return 0.0
        outer, network.spent_s = network.spent_s, 0.0
        try:
            result = self._work()
        except BaseException as error:
            self.tell = partial(self.future.set_exception, error)
        else:
            self.tell = partial(self.future.set_result, result)
        blocked_s, network.spent_s = network.spent_s, outer
        return blocked_s
