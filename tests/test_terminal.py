"""The log on a terminal, and the status line below it."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pty
import termios
from collections.abc import Iterator
from typing import Any

import pytest

from reqtable.run.commands.shown import terminal_width
from reqtable.run.signals import Progress, counted
from reqtable.run.terminal import TERMINAL, Output, Terminal

GONE = "\x1b[2K\r"


class Screen:
    """Provides a pseudo-terminal to use as standard error."""

    def __init__(self) -> None:
        self._own, theirs = pty.openpty()
        self.stream = os.fdopen(theirs, "w")
        self.log = logging.Logger("own")
        self.terminal = Terminal()
        self.log.addHandler(self.terminal)

    def written(self) -> str:
        """Return what was written since the last call."""
        os.write(self.stream.fileno(), b"\0")
        text = b""
        while not text.endswith(b"\0"):
            text += os.read(self._own, 4096)
        return text[:-1].decode().replace("\r\n", "\n")

    def close(self) -> None:
        self.stream.close()
        os.close(self._own)


@contextlib.contextmanager
def shown() -> Iterator[Screen]:
    """Show the log on a screen. Not a fixture, because pytest replaces standard error after the fixtures have run."""
    screen = Screen()
    try:
        with contextlib.redirect_stderr(screen.stream):
            yield screen
            TERMINAL.show(status="", progress="")
    finally:
        screen.close()


def test_a_record_takes_the_place_of_the_status_which_comes_back() -> None:
    with shown() as screen:
        screen.terminal.show(status="all is well ")
        assert screen.written() == f"{GONE}all is well "
        screen.log.warning("a\nb")
        assert screen.written() == f"{GONE}a\nb\nall is well "
        screen.terminal.show(status="all is well ")
        assert screen.written() == "", "what is there is not written again"
        screen.terminal.show(status="")
        assert screen.written() == GONE
        screen.log.warning("c")
        assert screen.written() == f"{GONE}c\n", "another process of this terminal may have a status line"


def test_progress_takes_the_place_of_the_status() -> None:
    with shown() as screen:
        screen.terminal.show(status="3 in the table")
        screen.terminal.show(progress="draining")
        screen.terminal.show(status="2 in the table")
        assert screen.written() == f"{GONE}3 in the table{GONE}draining"
        screen.log.warning("x")
        assert screen.written() == f"{GONE}x\ndraining"
        screen.terminal.show(progress="")
        assert screen.written() == f"{GONE}2 in the table"


def test_how_far_a_drain_is() -> None:
    with shown() as screen:
        progress = Progress(" workers")
        for left, seconds in ((3, 29.6), (3, 29.5), (1, 12.2), (0, 11.0)):
            progress(left, seconds)
        lines = ["draining: 3 of 3 workers, 30 s left", "draining: 1 of 3 workers, 12 s left", ""]
        assert screen.written() == "".join(GONE + each for each in lines)


def test_where_there_is_no_terminal_the_log_is_plain(capsys: Any) -> None:
    terminal = Terminal()
    log = logging.Logger("own")
    log.addHandler(terminal)
    terminal.show(status="all is well")
    log.warning("a")
    assert capsys.readouterr().err == "a\n"


def test_one_is_singular() -> None:
    assert [counted(count, "request") for count in (0, 1, 2)] == ["0 requests", "1 request", "2 requests"]


def test_a_line_on_standard_output_stands_above_the_status() -> None:
    with shown() as screen, contextlib.redirect_stdout(screen.stream):
        TERMINAL.show(status="1 in the table ")
        output = Output()
        output.handle(logging.makeLogRecord({"msg": "serving"}))
        assert screen.written() == f"{GONE}1 in the table {GONE}serving\n{GONE}1 in the table "
        TERMINAL.show(status="")
        assert screen.written() == GONE
        output.handle(logging.makeLogRecord({"msg": "more"}))
        assert screen.written() == "more\n"


def test_a_terminal_that_takes_no_more_does_not_keep_a_line_from_standard_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(io.StringIO):
        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            raise BlockingIOError

    monkeypatch.setattr("sys.stderr", Full())
    TERMINAL.show(status="1 in the table ")
    try:
        Output().handle(logging.makeLogRecord({"msg": "serving"}))
    finally:
        TERMINAL.show(status="")
    assert capsys.readouterr().out == "serving\n"


def test_a_line_is_as_wide_as_its_own_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    with shown() as screen:
        assert terminal_width(screen.stream) == 80, "it does not say"
        termios.tcsetwinsize(screen.stream, (24, 33))
        assert terminal_width(screen.stream) == 33
        monkeypatch.setenv("COLUMNS", "50")
        assert terminal_width(screen.stream) == 50
    assert terminal_width(io.StringIO()) is None
