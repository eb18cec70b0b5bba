"""The two forms of the lean path, Python and C, do the same. The C form keeps nothing, and follows no bad pointer."""

from __future__ import annotations

import gc
import inspect
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import reqtable
from reqtable import Limits
from reqtable.handlers.declaration import Declaration
from reqtable.handlers.lean import lean
from reqtable.net.stream import Stream
from reqtable.table.output import Output
from reqtable.table.table import Entry
from reqtable.table.want import Waiting, Want
from reqtable.testing import FakeClock
from tests.lean_work import transcript
from tests.support import echoing

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "reqtable" / "lean.c"
HEADERS = Path(sysconfig.get_path("include"))
COMPILER = shutil.which("cc") or shutil.which("gcc")
SEEDS = 150
PATIENCE_S = 120
needs_the_module = pytest.mark.skipif(lean is None, reason="the C module is not built, or REQTABLE_PURE turns it off")


def ran(*arguments: object, pure: bool = False) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.lean_work", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "REQTABLE_PURE": str(int(pure))},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """What the Python form does."""
    done = ran(0, SEEDS, pure=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@needs_the_module
def test_both_forms_do_the_same(expected: list[str]) -> None:
    done = ran(0, SEEDS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == expected
    events = " ".join(expected)
    for event in ("READY", "WRITING", "SLEEPING", "on_error", "on_limit", "on_eof", "on_timeout", "Ends(", "'from ano"):
        assert event in events


# What is changed in the C file, one at a time: the name, the old text, and the new.
MUTATIONS = [
    ("the size of the output is not compared", "Output_size)) == sent)", "Output_size)) >= sent)"),
    ("the limit of a line is not checked", "|| newline - begin >= limit ? NONE", "? NONE"),
    ("a line's newline is left", "NONE : newline - begin + 1;", "NONE : newline - begin;"),
    ("the request still runs", "SET(table, RequestTable_running, Py_None);", ""),
    ("the step is not counted", "add(entry, Entry_steps, 1)", "1"),
    ("the input is not counted", "add(entry, Entry_bytes_in, PyBytes_GET_SIZE(data))", "1"),
    ("the output is not counted", "!add(entry, Entry_bytes_out, sent)", "0"),
    ("the time is not noted", "SET(entry, Entry_active_at, SLOT(table, RequestTable_now));", ""),
    ("no error is handled", "PyErr_SetHandledException(error);", ""),
    ("the want is not stored", "SET(entry, Entry_want, want);", ""),
    ("the deadline is not cleared", "SET(entry, Entry_deadline, Py_None);", ";"),
    ("the timeout is not looked at", "Py_True && SLOT(entry, Entry_timeout) == Py_None", "Py_True"),
    ("the timeout of the next state is not set", "SLOT(next, Declaration_timeout)", "Py_None"),
    ("the next state is not set", "PyObject_SetAttr(handler, n__state, next) == 0", "1"),
    ("another's state is taken", "PyMethod_GET_SELF(transition) == handler", "1"),
    ("a wrapper is taken for its state", "SLOT(next, Declaration_function) != function", "0"),
    ("the rest begins too early", "PyBytes_AS_STRING(data) + end,", "PyBytes_AS_STRING(data),"),
    ("unread input is passed over", "found = has_unread ?", "found = has_unread < 0 ?"),
    ("no other state is seen", "SLOT(entry, Entry_state) == k_READING &&\n        ", ""),
    ("any want waits for input", "awaits == k_AWAITS_INPUT;", "1;"),
    ("an answer that is the data is an item", "if (*end >= 0)", "if (found == data) *end = size; else if (*end >= 0)"),
    ("others' output is the request's", "TABLE(entry, running) == entry &&\n", "\n"),
    ("the limit of the output is not checked", "PyBytes_GET_SIZE(data) <= LIMIT(entry, output_bytes_max) &&", ""),
    ("earlier output is lost", "SLOT(SLOT(entry, Entry_output), Output_first) == Py_None &&", ""),
    ("what ends the loop doesn't", "ends_loop ? ends_loop : Py_False", "Py_False"),
    ("no exception is the handler's", "PyErr_ExceptionMatches(PyExc_Exception) ?", "0 ?"),
]  # fmt: skip


@pytest.mark.slow
@needs_the_module
@pytest.mark.skipif(
    COMPILER is None or not (HEADERS / "Python.h").exists(), reason="there is no C compiler, or no Python.h"
)
@pytest.mark.timeout(2 * PATIENCE_S)
@pytest.mark.parametrize(("old", "new"), [each[1:] for each in MUTATIONS], ids=[each[0] for each in MUTATIONS])
def test_a_fault_in_c_is_found(old: str, new: str, expected: list[str], tmp_path: Path) -> None:
    text = SOURCE.read_text()
    assert text.count(old) == 1
    (tmp_path / "lean.c").write_text(text.replace(old, new))
    module = tmp_path / f"_lean{sysconfig.get_config_var('EXT_SUFFIX')}"
    built = (str(COMPILER), "-O1", "-w", "-shared", "-fPIC", f"-isystem{HEADERS}", tmp_path / "lean.c", "-o", module)
    subprocess.run(built, check=True, timeout=PATIENCE_S)
    try:
        done = ran(0, SEEDS, module)
    except subprocess.TimeoutExpired:
        return  # found: a request goes round for ever
    assert (done.returncode, done.stdout.splitlines()) != (0, expected)


@needs_the_module
def test_nothing_is_kept() -> None:
    """Neither an object nor a reference to a shared one, for each request or each step."""
    shared = (None, True, False, reqtable.State.READING, reqtable.line(), Limits, Entry, Stream, Declaration)
    seeds = range(40)

    def counts() -> tuple[int, list[int]]:
        gc.collect()
        return sys.getallocatedblocks(), [sys.getrefcount(each) for each in shared]

    for seed in [*seeds] * 3:  # caches fill
        transcript(seed)
    blocks, references = counts()
    requests = sum("on_close" in line for seed in seeds for line in transcript(seed))
    later_blocks, later_references = counts()
    assert requests > 300
    assert later_blocks - blocks < requests * 2 / 3
    assert max(later - before for before, later in zip(references, later_references, strict=True)) < requests / 3


def test_send_has_its_signature() -> None:
    assert list(inspect.signature(reqtable.StateRequestHandler.send).parameters) == ["self", "data"]


class Echo(reqtable.StateRequestHandler):
    @reqtable.state(reqtable.line())
    def line(self, item: bytes) -> Any:
        self.send(item)
        return self.other

    @reqtable.state(reqtable.line(), timeout=5)
    def other(self, item: bytes) -> Any:
        self.send(data=item)
        return self.line


HUGE = 2**70


@pytest.mark.parametrize("limits", [Limits(output_bytes_max=HUGE, buffered_bytes_max=None), Limits(loop_stall_s=9)])
def test_a_limit_may_be_larger_than_any_size(limits: Limits, clock: FakeClock) -> None:
    class Handler(Echo):
        @reqtable.state(reqtable.line(HUGE))
        def line(self, item: bytes) -> Any:
            self.send(item)
            return self.other

    with echoing(clock, Handler, limits) as (_, line):
        for _ in range(4):
            line(b"hello\n")


def test_a_piece_of_any_size_is_received_at_once(clock: FakeClock) -> None:
    """Above the size of the C form's buffer, the Python form receives."""
    with echoing(clock, Echo, Limits(recv_bytes=200_000)) as (entry, line):
        line(b"x" * 60_000 + b"\n")
        assert entry.bytes_in == 60_001


class OtherLimits:
    """Has the fields of `Limits`, in another place."""

    def __init__(self, limits: Limits) -> None:
        self.__dict__.update({field.name: getattr(limits, field.name) for field in fields(limits)})


class OtherOutput(Output):
    __slots__ = ("__dict__",)


def other_limits(entry: Entry) -> None:
    entry.table.limits = OtherLimits(entry.table.limits)  # type: ignore[assignment]


def other_output(entry: Entry) -> None:
    entry.output = OtherOutput()


@pytest.mark.parametrize("change", [other_limits, other_output])
def test_objects_of_other_classes_are_used_as_they_are(change: Callable[[Entry], None], clock: FakeClock) -> None:
    with echoing(clock, Echo) as (entry, line):
        change(entry)
        for _ in range(4):
            line(b"hello\n")
        assert (entry.steps, entry.bytes_out) == (5, 24)


def test_an_entry_that_is_made_anew_at_each_look_is_kept_while_it_is_used(clock: FakeClock) -> None:
    class Proxy:
        def __init__(self, entry: Entry) -> None:
            vars(self)["own"] = entry

        def __getattr__(self, name: str) -> Any:
            return getattr(vars(self)["own"], name)

        def __setattr__(self, name: str, value: Any) -> None:
            setattr(vars(self)["own"], name, value)

    class Handler(Echo):
        def __init__(self, entry: Entry) -> None:
            self._own = entry
            super().__init__(entry)

        @property
        def entry(self) -> Any:
            return Proxy(self._own)

        @entry.setter
        def entry(self, entry: Entry) -> None:
            pass

        @reqtable.state(reqtable.line())
        def line(self, item: bytes) -> Any:
            return self.other

        @reqtable.state(reqtable.line(), timeout=5)
        def other(self, item: bytes) -> Any:
            return self.line

    with echoing(clock, Handler) as (entry, line):
        line(b"hello\n", b"")
        assert (entry.handler.state_name, entry.timeout) == ("other", 5)
        line(b"hello\n", b"")
        assert (entry.handler.state_name, entry.timeout) == ("line", None)


def test_a_want_that_returns_its_argument_has_found_nothing(clock: FakeClock) -> None:
    class Upper(Want[bytes]):
        needs_bytes = True

        def first(self, data: bytes) -> Any:
            return data

        def take(self, entry: Waiting) -> Any:
            item = entry.input.through(b"\n", 100)
            return item.upper() if isinstance(item, bytes) else item

    class Handler(reqtable.StateRequestHandler):
        @reqtable.state(Upper())
        def only(self, item: bytes) -> Any:
            self.send(item)
            return self.only

    with echoing(clock, Handler) as (_, line):
        line(b"hello\n", b"HELLO\n")


# Deletes each attribute that the C form reads where it is in memory: before a step, and in one. The request may end,
# and even the loop, because such a program has broken the engine. Its process goes on.
DELETING = """
import logging, socket, reqtable
from contextlib import suppress

logging.disable()

def delete(entry, owner, name):
    it = entry if owner == "entry" else getattr(entry, owner)
    if hasattr(it, name):
        delattr(it, name)

class Handler(reqtable.StateRequestHandler):
    @reqtable.state(reqtable.line())
    def line(self, item):
        self.send(item)
        if in_step:
            delete(self.entry, owner, name)
        return self.line

for owner, names in {
    "entry": "active_at bytes_in bytes_out deadline held input output resumable state table timeout want",
    "table": "idle_is_unbounded limits now running thread",
    "transport": "entry request steps",
    "handler": "_state entry",
}.items():
    for name in names.split():
        for in_step in (False, True):
            server = reqtable.TCPServer(("127.0.0.1", 0), Handler)
            server.engine.loop.open()
            ours, theirs = socket.socketpair()
            server.process_request(ours, ("192.0.2.1", 1))
            (entry,) = server.table
            server.engine.loop.run_once(0)
            if not in_step:
                delete(entry, owner, name)
            for _ in range(2):
                with suppress(Exception):
                    theirs.send(b"hello\\n")
                    server.engine.loop.run_once(0)
print("all done")
"""


@needs_the_module
def test_an_attribute_that_is_gone_crashes_nothing() -> None:
    command = (sys.executable, "-c", DELETING)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stdout) == (0, "all done\n"), done.stderr
