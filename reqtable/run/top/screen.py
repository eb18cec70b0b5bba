"""`Screen`: joins the model, the view, the keyboard and the server, until the user quits.

One thread draws and reads keys. It never waits for the server: each question is asked in a thread of its own, so that
keys are answered while the server is held up.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from queue import SimpleQueue
from typing import Any

from rich.console import Console, Group
from rich.live import Live

from reqtable.run.top.controls import LOOK, press
from reqtable.run.top.keys import Keyboard
from reqtable.run.top.model import Act, Model, Sample, Unanswered, Wanted
from reqtable.run.top.view import frame

_PATIENCE_S = 3.0  # after so long without an answer, the screen says so
_REDRAW_S = 1.0  # how often, while an answer is awaited
_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
_OF_SIGNALS = 128  # what a shell adds to the number of a signal

Done = Callable[[Any], None]


class Screen:
    """Shows a model on the terminal, and asks the server every `interval_s` seconds."""

    def __init__(
        self, model: Model, look: Callable[[Wanted], Sample], act: Callable[[Act], str], interval_s: float
    ) -> None:
        self._model = model
        self._ask = look
        self._act = act
        self._interval_s = interval_s
        self._code: int | None = None  # the exit code; None: goes on
        self._results: SimpleQueue[tuple[Done, Any]] = SimpleQueue()
        self._woken, self._waker = socket.socketpair()
        self._asked_at: float | None = None  # when the answer that is awaited was asked for
        self._is_timed = False  # whether no user has asked for it, by a key or by another size
        self._is_outdated = False  # whether that answer is to a question of before
        self._next_at = 0.0
        self._size: os.terminal_size | None = None

    @staticmethod
    def is_possible() -> bool:
        """Return whether keys can be read from a terminal, and a screen be drawn on it."""
        return sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")

    def run(self) -> int:
        """Run until the user quits. Returns the exit code. The terminal is as before, however this ends."""
        self._waker.setblocking(False)
        self._next_at = time.monotonic() + self._interval_s
        console = Console(file=sys.stdout)
        live = Live(console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        with (
            self._woken,
            self._waker,
            self._signals(),
            Keyboard(sys.stdin.fileno()) as keyboard,
            live,
        ):
            while self._code is None:
                self._look_if_due()
                self._draw(console, live)
                self._wait(keyboard)
        return self._code

    def _draw(self, console: Console, live: Live) -> None:
        size = os.get_terminal_size(sys.stdout.fileno())
        if not size.columns or not size.lines:
            return  # a terminal that does not know its size
        before, self._size, console.size = self._size, size, size
        live.update(Group(*frame(self._model, size.columns, size.lines, time.time())), refresh=True)
        if size != before:
            self._look(is_timed=before is None)  # there may be room for more rows

    def _wait(self, keyboard: Keyboard) -> None:
        """Wait for a key, an answer, a signal, or the time to ask again."""
        ready, _, _ = select.select([keyboard.descriptor, self._woken.fileno()], [], [], self._left_s())
        if self._woken.fileno() in ready:
            self._woken.recv(4096)
        while not self._results.empty():
            then, result = self._results.get()
            then(result)
        if keyboard.descriptor in ready:
            try:
                keys = keyboard.read()
            except (EOFError, OSError):
                self._code = 1
                return
            for key in keys:
                self._do(press(self._model, key))

    def _left_s(self) -> float | None:
        if self._asked_at is not None:
            return _REDRAW_S
        return None if self._model.is_paused else max(0.0, self._next_at - time.monotonic())

    def _do(self, act: Act | None) -> None:
        if act == LOOK:
            self._look()
        elif act is not None and act.verb == "quit":
            self._code = 0
        elif act is not None:
            self._begin(partial(self._act, act), self._acted)

    # -- the server ---------------------------------------------------------------------------------------------------

    def _look_if_due(self) -> None:
        now = time.monotonic()
        if self._asked_at is not None:
            if now - self._asked_at > _PATIENCE_S and not self._is_unwanted:
                self._model.fail(f"no answer for {now - self._asked_at:.0f} s")
        elif not self._model.is_paused and now >= self._next_at:
            self._look(is_timed=True)

    @property
    def _is_unwanted(self) -> bool:
        """Whether the answer that is awaited is to be dropped: it was asked for before the pause."""
        return self._model.is_paused and self._is_timed

    def _look(self, is_timed: bool = False) -> None:
        """Ask the server; again, if an answer is awaited already: it is to a question of before."""
        if self._asked_at is not None:
            self._is_outdated = True
            return
        self._asked_at, self._is_timed = time.monotonic(), is_timed
        self._begin(partial(self._ask, self._model.wanted()), self._looked)

    def _looked(self, result: Any) -> None:
        self._asked_at = None
        if not self._is_unwanted:
            self._next_at = time.monotonic() + self._interval_s
            if isinstance(result, Unanswered):
                self._model.fail(str(result))
            else:
                self._model.take(result)
        if self._is_outdated:
            self._is_outdated = False
            self._look()

    def _acted(self, result: Any) -> None:
        self._model.message = str(result)
        self._look()

    def _begin(self, job: Callable[[], Any], then: Done) -> None:
        """Run a job in a thread of its own, and call `then` with its result in this one."""
        threading.Thread(target=self._run_job, args=(job, then), daemon=True).start()

    def _run_job(self, job: Callable[[], Any], then: Done) -> None:
        try:
            result: Any = job()
        except Unanswered as error:
            result = error
        except BaseException as error:  # raised again by the thread that draws
            then, result = _raise, error
        self._results.put((then, result))
        self._wake()

    def _wake(self) -> None:
        with suppress(OSError):  # it is woken already, or the screen has been closed
            self._waker.send(b"\0")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """End at signals that end a program, and draw anew when the size of the terminal changes."""

        def end(number: int, _: object) -> None:
            self._code = _OF_SIGNALS + number
            self._wake()

        handlers: dict[int, Any] = dict.fromkeys(_ENDING, end)
        handlers[signal.SIGWINCH] = lambda *_: self._wake()
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _raise(error: BaseException) -> None:
    raise error
