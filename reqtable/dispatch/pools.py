"""Executors that run calls (`call(on=…)`) and shipped steps, with the interface of `concurrent.futures.Executor`."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import os
import pickle
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor, Executor, Future
from typing import Any

from reqtable.config import ExecutorOptions
from reqtable.config.import_string import thing_at
from reqtable.dispatch.forking.child import Child, become_child, fork, keep
from reqtable.dispatch.policy import Host
from reqtable.loop.poller import Descriptor
from reqtable.loop.process import flush_streams, leave_child
from reqtable.loop.step import Steps
from reqtable.table.errors import ConfigurationError, HandlerError
from reqtable.table.states import READ
from reqtable.table.tracebacks import NOTED, account_of, note_traceback

log = logging.getLogger("reqtable")

_PIPE_BYTES = 65_536


class RestartingPool(Executor):
    """Runs functions in an executor made by a factory. If the executor breaks, makes another one.

    `place` is where the factory is configured. The constructor makes the first executor. It raises ConfigurationError
    if the factory can't be imported, fails, or returns no Executor.
    """

    def __init__(self, name: str, options: ExecutorOptions, place: str | None = None) -> None:
        self._name = name
        self._options = options
        self._place = f"{place}: {name}" if place else name
        self._lock = threading.Lock()
        self._out: set[Future[Any]] = set()
        self._is_shut = False
        self._broken: list[Executor] = []
        self._executor: Executor | None = self._make()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if self._is_shut:
            raise RuntimeError(f"{self._name} is shut down")
        executor = self._current()
        try:
            future = executor.submit(fn, *args, **kwargs)
        except RuntimeError:  # the executor is broken, or other code that shares it has shut it down
            self._drop(executor)
            executor = self._current()
            future = executor.submit(fn, *args, **kwargs)
        self._out.add(future)

        def look(done: Future[Any]) -> None:
            self._out.discard(done)
            if not done.cancelled() and isinstance(done.exception(), BrokenExecutor):
                self._drop(executor)

        future.add_done_callback(look)
        return future

    def wait_for_all(self) -> None:
        """Wait for everything that was submitted."""
        concurrent.futures.wait(list(self._out))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        with self._lock:
            self._is_shut = True
            executor, self._executor = self._executor, None
        self._bury()
        if executor is not None:
            executor.shutdown(wait=wait)  # not every Executor knows cancel_futures

    def abandon(self) -> None:
        """In a forked child: drop the executor, whose workers are the parent's. Another one is made when needed."""
        self._lock = threading.Lock()
        keep(self._executor)
        self._executor = None

    def _current(self) -> Executor:
        self._bury()
        with self._lock:
            if self._executor is None:
                self._executor = self._make()
            return self._executor

    def _drop(self, broken: Executor) -> None:
        """Have the next `submit` make another executor. Several requests may report the same broken one.

        The broken executor is shut down later, because this may be called while it holds its own lock.
        """
        with self._lock:
            if self._executor is broken:
                log.warning("%s broke: a worker died, or someone shut it down; a new one is made", self._name)
                self._executor = None
                self._broken.append(broken)

    def _bury(self) -> None:
        while self._broken:
            self._broken.pop().shutdown(wait=False)

    def _make(self) -> Executor:
        factory, arguments = self._options.factory, self._options.arguments
        try:
            if factory is None:
                # Only here, because both are slow to import.
                import multiprocessing
                from concurrent.futures import ProcessPoolExecutor

                # Not forked, or a worker would hold copies of the server's descriptors.
                context = multiprocessing.get_context("spawn")
                ours = {"mp_context": context, "initializer": end_with_parent}
                made: Any = ProcessPoolExecutor(**{**ours, **arguments})
            else:
                made = thing_at(factory)(**arguments)
        except (Exception, SystemExit) as error:
            what = f"factory {factory!r}" if factory else "the pool of processes"
            is_dask_missing = isinstance(error, ModuleNotFoundError) and error.name in ("dask", "distributed")
            mend = ": pip install 'reqtable[cluster]'" if is_dask_missing else ""
            raise ConfigurationError(f"{self._place}: {what}: {account_of(error)}{mend}") from error
        if not isinstance(made, Executor):
            raise ConfigurationError(
                f"{self._place}: factory {factory!r} returned {made!r}, not a concurrent.futures.Executor"
            )
        return made


class ForkExecutor(Executor):
    """Runs each call in a forked child, at most `children_max` at a time. Only the result has to be picklable.

    Cancelling a call kills its child.
    """

    def __init__(self, host: Host, children_max: int) -> None:
        if not hasattr(os, "fork"):
            raise ConfigurationError('executor "fork": this platform has no fork()')
        self._host = host
        self._children_max = children_max
        self._waiting: deque[_ForkedCall] = deque()
        self._running: set[_ForkedCall] = set()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = _ForkedCall(self, lambda: fn(*args, **kwargs))
        self._host.watching_steps.post(self._begin, future)  # only the loop's thread may use its selector
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._waiting.clear()
        for future in list(self._running):
            future.cancel()
            if future.child is not None:
                future.child.collect(blocking=True)

    def abandon(self) -> None:
        """In a forked child: drop the other children, which are the parent's."""
        for future in self._running:
            future.abandon()
        self._running.clear()
        self._waiting.clear()

    def _begin(self, future: _ForkedCall) -> None:
        if len(self._running) >= self._children_max:
            self._waiting.append(future)
        elif future.set_running_or_notify_cancel():
            self._running.add(future)
            future.start(self._host)

    def ended(self, future: _ForkedCall) -> None:
        """Start calls that wait, because the child of `future` has been waited for."""
        self._running.discard(future)
        while self._waiting and len(self._running) < self._children_max:
            self._begin(self._waiting.popleft())


class _ForkedCall(Future[Any]):
    """Runs one call in a child, and receives the result through a pipe."""

    def __init__(self, executor: ForkExecutor, run: Callable[[], Any]) -> None:
        super().__init__()
        self._executor = executor
        self._run = run
        self.child: Child | None = None
        self._pipe: _Pipe

    def start(self, host: Host) -> None:
        ends: tuple[int, ...] = ()
        try:
            ends = reader, writer = os.pipe()
            flush_streams()
            pid = fork()
        except Exception as error:  # no descriptor or process left, or Python 3.12's warning about threads as an error
            for end in ends:
                os.close(end)
            self._executor.ended(self)
            self.set_exception(error)
            return
        if not pid:
            self._be_child(host, writer)
        os.close(writer)
        self._pipe = _Pipe(host.watching_steps, reader)
        self.child = Child(host.watching_steps, pid, self._on_exit)

    def cancel(self) -> bool:
        if self.child is not None:
            self.child.kill()
        return super().cancel()

    def abandon(self) -> None:
        if self.child is not None:
            self.child.abandon()
            os.close(self._pipe.fd)

    def _be_child(self, host: Host, writer: int) -> None:
        try:
            become_child(None, host)
            result = _pickled(self._run)
            while result:
                result = result[os.write(writer, result) :]
        finally:
            leave_child()

    def _on_exit(self, child: Child) -> None:
        data = self._pipe.end()
        self._executor.ended(self)
        how = child.how_it_failed()
        if not data:
            self.set_exception(HandlerError(f"the child that ran a call {how or 'exited without a result'}"))
            return
        try:
            error, value = pickle.loads(data)
        except Exception as problem:
            error, value = HandlerError(f"the result of a forked call can't be read: {problem!r}"), None
        if error is not None:
            self.set_exception(error)
        else:
            self.set_result(value)


class _Pipe(Descriptor):
    """Reads what a child writes as it comes. Otherwise a child that writes more than a pipe holds would never exit."""

    __slots__ = ("_data",)

    def __init__(self, steps: Steps, fd: int) -> None:
        super().__init__(steps.poller, fd)
        os.set_blocking(fd, False)
        self._data = bytearray()
        self.watch(READ)

    def on_ready(self, mask: int) -> None:
        if self._read() == b"":
            self.watch(0)

    def _read(self) -> bytes | None:
        try:
            data = os.read(self.fd, _PIPE_BYTES)
        except BlockingIOError:
            return None
        self._data += data
        return data

    def end(self) -> bytes:
        """Read the rest, close the pipe, and return all that the child has written."""
        self.watch(0)
        while self._read():
            pass
        os.close(self.fd)
        return bytes(self._data)


def _pickled(run: Callable[[], Any]) -> bytes:
    """Call `run`. Returns the pair of what it raised and what it returned, pickled."""
    error: BaseException | None = None
    value: Any = None
    try:
        value = run()
    except Exception as problem:
        error = problem
    except BaseException as problem:
        error = HandlerError(f"a forked call raised {problem!r}")
    with contextlib.suppress(Exception):
        return pickle.dumps((error if error is None else portable(error), value))
    unfit = f"a forked call returned a {type(value).__name__}, which can't be pickled"
    return pickle.dumps((HandlerError(unfit), None))


def end_with_parent() -> None:
    """In a worker: exit when the server has gone, however it went. Otherwise the worker would wait for ever.

    Ctrl-C goes to the worker, too. It ends the worker's call, so that the server need not wait for it. SystemExit does
    that without the traceback of a KeyboardInterrupt.
    """
    import signal
    from multiprocessing import connection, parent_process

    signal.signal(signal.SIGINT, lambda *_: sys.exit())
    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="reqtable-parent", daemon=True).start()


def guarded(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """In a worker: return `fn(*args, **kwargs)`, and make an error that it raises portable.

    An exception that can be pickled but not unpickled would break the whole pool.
    """
    try:
        return fn(*args, **kwargs)
    except Exception as error:
        raise portable(error) from None


def portable(error: BaseException) -> BaseException:
    """Note the traceback in `error`. Return it if it survives pickling, else a HandlerError with its text and notes."""
    note_traceback(error)
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        words = HandlerError(f"{type(error).__name__}: {error}")
        vars(words).update({name: each for name, each in vars(error).items() if name in NOTED})
        return words
    return error
