"""A handler whose worker can be killed at exact points: the server of `tests/test_takeover.py`.

Its client names the point (`kill POINT`), and the next time that the worker gets there it kills itself. Or
`REQTABLE_TEST_KILLS` says at which of all points, such as "7 30 2": the first worker dies at its seventh, its successor
at its 30th, and so on. `REQTABLE_TEST_WORKERS` names a file that counts the workers.
"""

from __future__ import annotations

import os
import signal
from typing import Any, NoReturn

import reqtable
from reqtable import exactly, line, sleep, start_tls, state
from reqtable.handover import journal, journalled, taking_over
from reqtable.handover.journal import Journal, Slot
from reqtable.handover.journalled_steps import JournalledSteps
from reqtable.table.states import State

_next: list[str] = []  # the point, until the step that was told of it is over
_armed: list[str] = []


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("killed")


def _arm() -> None:
    if _next:
        _armed[:] = _next
        _next.clear()


class _Plan:
    """Counts the points that this process comes to, until the one at which it is to die."""

    left: int | None = None  # None: it has come to none

    @classmethod
    def count(cls) -> None:
        if cls.left is None:
            cls.left = cls._points()
        cls.left -= 1
        if not cls.left:
            die()

    @staticmethod
    def _points() -> int:
        plan = [int(each) for each in os.environ.get("REQTABLE_TEST_KILLS", "").split()]
        if not plan:
            return 0
        with open(os.environ["REQTABLE_TEST_WORKERS"], "ab") as file:
            file.write(b".")
            number = file.tell()
        return plan[number - 1] if number <= len(plan) else 0


def die_at(point: str) -> None:
    if _armed == [point]:
        die()
    _Plan.count()


_step, _flush, _take_in = journalled._step, journalled._flush, JournalledSteps.take_in
_open, _close, _write, _commit, _free = Journal.open, Journal.close, Journal.write, Journal.commit, Journal.free


def step(*args: Any) -> None:
    _arm()
    die_at("received")
    _step(*args)


def take_in(*args: Any) -> None:
    _arm()
    die_at("received")
    _take_in(*args)


def flush(stream: Any) -> bool:
    die_at("noted")  # the journal has the output, the kernel does not
    if _armed == ["half sent"]:
        output = stream.entry.output
        stream.request.send(bytes(output.front())[: output.size // 2])
        die()
    is_taken = _flush(stream)
    die_at("sent")
    return is_taken


def open_page(self: Journal, *args: Any) -> None:
    if _next and _next[0].startswith("page"):
        _arm()
    if _armed == ["page half open"]:
        self.numbers[journal.PHASE] = journal.IDLE
        self.numbers[journal.ROW] = args[0]
        die()
    _open(self, *args)
    die_at("page open")


def close_page(self: Journal, output: bytes | None) -> None:
    die_at("page not closed")
    _close(self, output)
    die_at("page closed")


def write(self: Journal, slot: Slot, payload: bytes, *args: Any) -> None:
    die_at("not written")
    if _armed == ["torn"]:
        _write(self, slot, payload, *args)
        assert slot.current is not None
        memory, at, _ = slot.current
        memory[at + 60 : at + 60 + len(payload) // 2] = bytes(len(payload) // 2)
        die()
    _write(self, slot, payload, *args)
    die_at("written")


def commit(self: Journal) -> None:
    _commit(self)
    die_at("committed")


def free(self: Journal, slot: Slot) -> None:
    die_at("closed")
    _free(self, slot)
    die_at("freed")


def enter(self: Any, server: int) -> None:
    _arm()
    die_at("accepted")
    _enter(self, server)


_enter = journalled.JournalledStream.enter
changed: dict[Any, dict[str, Any]] = {
    journalled: {"_step": step, "_flush": flush},
    JournalledSteps: {"take_in": take_in},
    Journal: {"open": open_page, "close": close_page, "write": write, "commit": commit, "free": free},
    journalled.JournalledStream: {"enter": enter},
}
for owner, functions in changed.items():
    for name, function in functions.items():
        setattr(owner, name, function)

# -- bugs for the tests to find ---------------------------------------------------------------------------------------


def flush_late(stream: Any) -> bool:
    """Send, and write the journal afterwards."""
    output = stream.entry.output
    if output.size >= journal.OUTPUT_MAX:
        return flush(stream)
    stream.noted = True
    is_taken = _flush(stream)
    die_at("sent")
    if stream.entry.state is not State.CLOSED:
        stream.record()
    return is_taken


def take_in_forgetful(*args: Any) -> None:
    """Receive, but not into the journal's memory."""
    memory = args[1].transport.journal.memory
    memory[journal.INPUT_AT : journal.INPUT_AT + 1000] = bytes(1000)
    take_in(*args)


def rest_repeated(found: Any, progress: Any, page: Any, now: Any) -> Any:
    """Ignore how much the kernel says that was sent."""
    return _rest_of(found, progress, page, now._replace(sent=found.sent if page is None else page.sent))


_rest_of = taking_over.rest_of
BUGS: dict[str, tuple[Any, str, Any]] = {
    "journal after send": (journalled.JournalledStream, "flush", flush_late),
    "input not kept": (JournalledSteps, "take_in", take_in_forgetful),
    "totals not asked": (taking_over, "rest_of", rest_repeated),
}
if bug := os.environ.get("REQTABLE_TEST_BUG"):
    setattr(*BUGS[bug])


class TakenOver(reqtable.StateRequestHandler):
    """Answers lines. Two of its fields change with `add`, none with `echo`."""

    count: int = 0
    shown: bytes = b""  # the last four numbers

    @state(line(), timeout=60)
    def ask(self, text: bytes) -> Any:
        verb, *rest = text.split()
        if verb == b"kill":
            _next[:] = [b" ".join(rest).decode()]
            self.send(b"armed\n")
        elif verb == b"echo":
            self.send(text)
        elif verb == b"pid":
            self.send(b"%d\n" % os.getpid())
        elif verb == b"big":
            self.send(b"x" * int(rest[0]) + b"\n")
        elif verb == b"crash":
            die()
        elif verb == b"crash-once":
            if not self.entry.attempt:
                die()
            self.send(b"attempt %d\n" % self.entry.attempt)
        elif verb == b"attempt":
            self.send(b"attempt %d, moved %d times\n" % (self.entry.attempt, self.entry.moves))
        elif verb == b"sleep":
            self.send(b"sleeping\n")
            return self.awake, sleep(float(rest[0]))
        elif verb == b"tls":
            self.send(b"go\n")
            return self.secured, start_tls(cert=rest[0].decode())
        elif verb == b"take":
            return self.taken, exactly(int(rest[0]))
        elif verb == b"bye":
            self.send(b"bye\n")
            return None
        else:
            return self.add(int(rest[0]))
        return self.ask

    @state()
    def awake(self, _: None) -> Any:
        return self.add(0)

    @state()
    def secured(self, _: None) -> Any:
        return self.add(0)

    @state()
    def taken(self, data: bytes) -> Any:
        return self.add(sum(data))

    def add(self, number: int) -> Any:
        self.count += 1
        self.shown = b" ".join([*self.shown.split(), b"%d" % number][-4:])
        self.send(b"%d %b\n" % (self.count, self.shown))
        return self.ask

    def on_eof(self, partial: bytes) -> Any:
        if partial:
            self.send(b"partial " + partial)
        return None
