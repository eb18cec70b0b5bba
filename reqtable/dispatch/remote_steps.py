"""Resumables that run single steps of a handler elsewhere, while the loop does the I/O.

Each submits a step, wants its outcome (`STEP`), and then returns the want that the step returned. It submits the next
step only when that want is satisfied, so the steps of one request never overlap. If the request ends while a step is
running, the handler is closed when the step has returned.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from threading import get_ident
from typing import Any, ClassVar

from reqtable.loop.failures import tell_server
from reqtable.loop.process import end_child
from reqtable.table.engine_wants import STEP
from reqtable.table.errors import HandlerError, ending_of
from reqtable.table.output import Output
from reqtable.table.parts import Resumable
from reqtable.table.table import Entry
from reqtable.table.want import Want


class RemoteSteps:
    """Runs the steps of one handler elsewhere. A subclass says where."""

    bound_to_thread: ClassVar[bool] = False

    def __init__(self, entry: Entry, handler: Any) -> None:
        self._entry = entry
        self._handler = handler
        self._is_out = False  # a step is running elsewhere
        self._awaits_step = False  # the next item is a step's outcome, which may have come already
        self._closes = False  # the request ended while its step was running
        self._was_partial = False  # the client had part of an answer when the last step began
        self._thrown: BaseException | None = None  # the error that the last step got instead of an item

    def _submit(self, method: str, argument: Any) -> Future[Any]:
        """Submit a step: a call of the handler's `method`, which is `_resume` or `_throw`."""
        raise NotImplementedError

    def _arrive(self, done: Future[Any]) -> Want[Any] | None:
        """Return the want of the step that is done. Raises what the step raised."""
        raise NotImplementedError

    def _close_handler(self) -> None:
        self._handler._close()

    # -- for the loop -------------------------------------------------------------------------------------------------

    def _resume(self, item: Any) -> Want[Any] | None:
        if not self._awaits_step:
            return self._begin("_resume", item)
        self._awaits_step = False
        thrown, self._thrown = self._thrown, None
        want = self._arrive(item)
        if want is None and thrown is not None:
            self._entry.ending = ending_of(thrown)
        return want

    def _throw(self, error: BaseException) -> Want[Any] | None:
        self._thrown = error
        return self._begin("_throw", error)

    def _close(self) -> None:
        if self._is_out:
            self._closes = True
        else:
            self._close_handler()

    def _last_words(self) -> bytes:
        if not self._is_out:
            return self._handler._last_words()  # type: ignore[no-any-return]
        reach = self._entry.reach  # what the running step sends is dropped
        return b"" if self._was_partial else self._handler._apology(reach is not None and bool(reach.connections))

    def _begin(self, method: str, argument: Any) -> Want[Any]:
        self._was_partial = self._handler._is_partial
        number = self._entry.expect_result()
        owner = self._entry.table.owner
        assert owner is not None
        post = owner.post
        future = self._submit(method, argument)
        self._is_out = self._awaits_step = True
        future.add_done_callback(lambda done: post(self._done, number, done))
        return STEP

    def _done(self, number: int, done: Future[Any]) -> None:
        """In the loop: deliver the outcome of a step, or close the handler of a request that has ended."""
        entry = self._entry
        self._is_out = False
        if self._closes:
            self._closes = False
            try:
                self._close_handler()
            except Exception as error:
                tell_server(entry.server, None, entry.peer, error, entry.id)
        elif entry.table.owner is not None:
            entry.table.owner.deliver(entry, number, done)


class ThreadSteps(RemoteSteps):
    """Runs steps in threads of this process, on the handler itself."""

    def __init__(self, entry: Entry, handler: Any, executor: Executor) -> None:
        super().__init__(entry, handler)
        self._executor = executor
        self._step: _ThreadStep

    def _done(self, number: int, done: Future[Any]) -> None:
        del self._entry.table.elsewhere[self._entry]
        super()._done(number, done)

    def _submit(self, method: str, argument: Any) -> Future[Any]:
        step = self._step = self._entry.table.elsewhere[self._entry] = _ThreadStep()
        try:
            return self._executor.submit(step.run, getattr(self._handler, method), argument)
        except BaseException:
            del self._entry.table.elsewhere[self._entry]
            raise

    def _arrive(self, done: Future[Any]) -> Want[Any] | None:
        self._entry.output.extend(self._step.output)
        want: Want[Any] | None = done.result()
        return want


class _ThreadStep:
    """Runs one step in a thread and collects what it sends, because only the loop may touch the entry's output."""

    __slots__ = ("output", "thread")

    def __init__(self) -> None:
        self.thread: int | None = None
        self.output = Output()

    def run(self, method: Callable[[Any], Want[Any] | None], argument: Any) -> Want[Any] | None:
        self.thread = get_ident()
        process = os.getpid()
        try:
            return method(argument)
        except BaseException as error:
            if os.getpid() != process:
                end_child(error)  # the step forked, and only the parent's thread goes on
            if isinstance(error, Exception):
                raise
            # a SystemExit, say: it ends the step, not the server
            raise HandlerError(f"a step raised {error!r}") from error
        finally:
            self.thread = None
            if os.getpid() != process:
                end_child()


class ByState:
    """Runs a state machine that pins some of its states to a policy (`@state(dispatch=…)`)."""

    bound_to_thread: ClassVar[bool] = False

    def __init__(self, handler: Any, default: Resumable, pinned: Mapping[str, Resumable]) -> None:
        self._handler = handler
        self._default = default
        self._pinned = pinned
        self._last = default

    def _resume(self, item: Any) -> Want[Any] | None:
        if not getattr(self._last, "_awaits_step", False):  # else the item is the outcome of its step
            self._choose()
        return self._last._resume(item)

    def _throw(self, error: BaseException) -> Want[Any] | None:
        self._choose()
        return self._last._throw(error)

    def _last_words(self) -> bytes:
        last_words = getattr(self._last, "_last_words", None)
        return b"" if last_words is None else last_words()

    def _close(self) -> None:
        self._last._close()

    def _choose(self) -> None:
        self._last = self._pinned.get(self._handler.state_name, self._default)
