"""`Threads`: the executor for a server's calls and for policy `pool`.

The interpreter's exit always waits for the threads of `concurrent.futures.ThreadPoolExecutor`. The threads here are
daemons, so the server decides whether the exit waits for them, as it does for the threads of policy `thread`.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any
from weakref import WeakSet

from reqtable.loop.process import end_child

_Task = tuple[Future[Any] | None, Callable[[], Any]]  # None: nobody waits for the outcome


class Threads(Executor):
    """Runs tasks in at most `most` threads, named after `name`. If no thread is idle, a task starts another.

    The interpreter's exit waits for running tasks, unless `may_leave()` is true then.

    At most one thread is woken at a time; when it has taken a task and another waits, it wakes the next. So a thread
    that takes one short task after another is not joined by threads that find nothing to do: waking one costs more than
    a short task. A queue of the standard library wakes a thread for each task.
    """

    def __init__(self, most: int, name: str, may_leave: Callable[[], bool]) -> None:
        self._most = most
        self._name = name
        self._may_leave = may_leave
        self._lock = threading.Lock()  # of all that follows
        self._tasks: deque[_Task] = deque()  # that wait for a thread
        self._threads: list[threading.Thread] = []
        self._idle: list[threading.Lock] = []  # of each idle thread the lock whose release wakes it, the latest last
        self._is_waking = False  # a thread was woken, and has not looked for a task yet
        self._free = 0  # threads that run no task, less the tasks that wait
        self._is_shut = False
        _open.add(self)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run `fn` in a thread. Raises RuntimeError after `shutdown()`, or if not even one thread can be started."""
        future: Future[Any] = Future()
        self._add((future, partial(fn, *args, **kwargs)))
        return future

    def run(self, task: Callable[[], None]) -> None:
        """Run `task` in a thread, even if a shutdown cancels what was submitted. It must not raise.

        It makes no Future, which would be a fifth of the cost. An idle thread takes it when `wake()` is called.
        """
        self._add((None, task), wakes=False)

    def wake(self) -> None:
        """Wake an idle thread, if a task waits."""
        with self._lock:
            if self._tasks:
                self._wake_one()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more tasks. With `wait`, return when every thread has ended, except the caller's own."""
        cancelled: list[_Task] = []
        with self._lock:
            self._is_shut = True
            if cancel_futures:
                cancelled = [task for task in self._tasks if task[0] is not None]
                self._tasks = deque(task for task in self._tasks if task[0] is None)
            while self._idle:
                self._idle.pop().release()
        for future, _ in cancelled:
            assert future is not None
            future.cancel()
        if wait:  # otherwise the interpreter's exit may still have to wait
            for thread in self._threads:
                if thread is not threading.current_thread():
                    thread.join()
            _open.discard(self)

    def load(self) -> tuple[int, int, int]:
        """Return how many threads run a task, how many are idle, and how many tasks wait."""
        with self._lock:
            waiting = len(self._tasks)
            idle = min(max(0, self._free + waiting), len(self._threads))
            return len(self._threads) - idle, idle, waiting

    def leave(self) -> None:
        """Wait for the threads at the interpreter's exit, unless `may_leave()` is true."""
        if not self._may_leave():
            self.shutdown(cancel_futures=True)

    def _add(self, task: _Task, wakes: bool = True) -> None:
        with self._lock:
            if self._is_shut:
                raise RuntimeError(f"the threads {self._name} are shut down: nothing can be run in them")
            if self._free <= 0 and len(self._threads) < self._most:
                self._begin_thread()
            self._free -= 1
            self._tasks.append(task)
            if wakes:
                self._wake_one()

    def _wake_one(self) -> None:
        """Wake an idle thread, unless one is awake and has yet to look for a task. The caller has the lock."""
        if self._idle and not self._is_waking:
            self._is_waking = True
            self._idle.pop().release()

    def _begin_thread(self) -> None:
        thread = threading.Thread(target=self._run, name=f"{self._name}_{len(self._threads)}", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system has no threads left
            if not self._threads:
                raise
        else:
            self._threads.append(thread)
            self._free += 1

    def _run(self) -> None:
        gate = threading.Lock()
        gate.acquire()
        with self._lock:
            while self._tasks or not self._is_shut:
                if not self._tasks:
                    self._idle.append(gate)
                    self._lock.release()
                    gate.acquire()
                    self._lock.acquire()
                    self._is_waking = False
                    continue
                task = self._tasks.popleft()
                if self._tasks:
                    self._wake_one()
                self._lock.release()
                _perform(*task)
                del task  # an idle thread must not keep it alive
                self._lock.acquire()
                self._free += 1


def _perform(future: Future[Any] | None, run: Callable[[], Any]) -> None:
    if future is None:
        _perform_alone(run)
        return
    if not future.set_running_or_notify_cancel():
        return
    process = os.getpid()
    try:
        result = run()
        if os.getpid() != process:
            end_child()  # the task forked; this pool's other threads exist only in the parent
    except BaseException as error:
        if os.getpid() != process:
            end_child(error)
        future.set_exception(error)
        del future  # breaks a cycle: the error's traceback holds the future, and the future holds the error
    else:
        future.set_result(result)


def _perform_alone(run: Callable[[], Any]) -> None:
    process = os.getpid()
    try:
        run()
    finally:
        if os.getpid() != process:
            end_child(sys.exc_info()[1])


_open: WeakSet[Threads] = WeakSet()


def _leave_all() -> None:
    for each in list(_open):
        each.leave()


atexit.register(_leave_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_open.clear)  # a child has none of the parent's threads
