"""`Threads`: the executor that runs the calls of a server and its policy `pool`.

`concurrent.futures.ThreadPoolExecutor` has the interpreter's exit wait for each of its threads. These threads are
daemons, so that a server can say whether the exit waits for them, as it says of the threads of policy `thread`.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any
from weakref import WeakSet

from reqtable.loop.process import end_child

_Task = tuple[Future[Any], Callable[[], Any]]


class Threads(Executor):
    """At most `most` threads, named after `name`. One is begun when a task comes and no other is idle.

    The interpreter's exit waits for the tasks that run, unless `may_leave()` is true then.
    """

    def __init__(self, most: int, name: str, may_leave: Callable[[], bool]) -> None:
        self._most = most
        self._name = name
        self._may_leave = may_leave
        self._changed = threading.Condition(threading.Lock())  # there is a task, or no more to come
        self._tasks: deque[_Task] = deque()  # that wait for a thread
        self._threads: list[threading.Thread] = []
        self._idle = 0  # threads that wait for a task
        self._is_shut = False
        _open.add(self)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run `fn` in a thread. Raises RuntimeError after `shutdown()`, and where not even one thread can be begun."""
        future: Future[Any] = Future()
        with self._changed:
            if self._is_shut:
                raise RuntimeError(f"the threads {self._name} are shut down: nothing can be run in them")
            if self._idle <= len(self._tasks) and len(self._threads) < self._most:
                self._begin_thread()
            self._tasks.append((future, partial(fn, *args, **kwargs)))
            self._changed.notify()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take nothing more; with `wait`, return when every thread has ended, but for the one that calls this."""
        cancelled: list[_Task] = []
        with self._changed:
            self._is_shut = True
            if cancel_futures:
                cancelled += self._tasks
                self._tasks.clear()
            self._changed.notify_all()
        for future, _ in cancelled:
            future.cancel()
        if wait:  # else the interpreter's exit may still have to
            for thread in self._threads:
                if thread is not threading.current_thread():
                    thread.join()
            _open.discard(self)

    def leave(self) -> None:
        """At the interpreter's exit."""
        if not self._may_leave():
            self.shutdown(cancel_futures=True)

    def _begin_thread(self) -> None:
        thread = threading.Thread(target=self._run, name=f"{self._name}_{len(self._threads)}", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the machine has none left
            if not self._threads:
                raise
        else:
            self._threads.append(thread)
            self._idle += 1

    def _run(self) -> None:
        while (task := self._next()) is not None:
            _perform(*task)
            del task  # an idle thread holds on to nothing
            with self._changed:
                self._idle += 1

    def _next(self) -> _Task | None:
        """The next task; None when there are no more to come."""
        with self._changed:
            while not self._tasks:
                if self._is_shut:
                    return None
                self._changed.wait()
            self._idle -= 1
            return self._tasks.popleft()


def _perform(future: Future[Any], run: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    process = os.getpid()
    try:
        result = run()
        if os.getpid() != process:
            end_child()  # the threads that would go on are the parent's
    except BaseException as error:
        if os.getpid() != process:
            end_child(error)
        future.set_exception(error)
        del future  # else the error's traceback would hold on to the future, which holds the error
    else:
        future.set_result(result)


_open: WeakSet[Threads] = WeakSet()


def _leave_all() -> None:
    for each in list(_open):
        each.leave()


atexit.register(_leave_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_open.clear)  # the parent's threads are not in the child
