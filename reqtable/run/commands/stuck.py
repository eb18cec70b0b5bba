"""Says which workers are stuck, where, and what ends them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any, Protocol

from reqtable.run.commands import shown

GRACE_S = 5.0  # how long after its time to drain the supervisor kills a worker

_FRAME = re.compile(r'\s*File "(?P<file>[^"]*)", line (?P<line>\d+) in (?P<function>.*)')
_LOOP_ENDS = ("/reqtable/loop/loop.py", "/reqtable/loop/step.py")
_OWN = f"{Path(__file__).parents[2]}/"


class Answering(Protocol):
    """Describes a server that tells its limits."""

    def limit_s(self, name: str) -> float: ...


def stuck_in(workers: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the workers that do not answer."""
    return [each for each in workers if each.get("is_stuck")]


def killed_text(server: Answering) -> str:
    """Say how long after its order to end a stuck worker is killed."""
    drain_s = server.limit_s("drain_timeout_s")
    return f"it is killed after {shown.age(drain_s + GRACE_S)}" if drain_s < inf else "no limit of time ends it"


def stack_lines(lines: Sequence[str]) -> list[str]:
    """Return what a stuck worker wrote of its threads: the loop's thread first, from the code that it serves inwards.

    Threads that are in code of reqtable come not at all: they only wait. Without a thread of the loop, all stays as it
    is.
    """
    threads = _threads(lines)
    loops = [each for each in threads if _loop_place(each) is not None]
    if not loops:
        return list(lines)
    others = [each for each in threads if each is not loops[0] and not _is_own(each[1])]
    return [line for each in [_cut(loops[0]), *others] for line in each]


def place_of(lines: Sequence[str]) -> str | None:
    """Return where the loop of a stuck worker is, such as `app/report.py:14 in build`; None: it is not known."""
    loop = next((each for each in _threads(lines) if _loop_place(each) is not None), None)
    frame = None if loop is None else _FRAME.match(loop[1])
    return None if frame is None else f"{_brief(frame['file'])}:{frame['line']} in {frame['function']}"


def _threads(lines: Sequence[str]) -> list[list[str]]:
    """Return the lines of each thread that has a frame: its title, and its frames, the innermost first."""
    threads: list[list[str]] = []
    for line in lines:
        if _FRAME.match(line) and threads:
            threads[-1].append(line)
        elif line.strip():
            threads.append([line])
    return [each for each in threads if len(each) > 1]


def _loop_place(thread: Sequence[str]) -> int | None:
    """Return the place of the innermost frame of the loop."""
    return next((place for place, line in enumerate(thread) if _file(line).endswith(_LOOP_ENDS)), None)


def _cut(thread: list[str]) -> list[str]:
    """Leave out the frames around the code that the loop has called, which is never told to be ours alone."""
    end = _loop_place(thread)
    called = thread[:end]
    while len(called) > 1 and _is_own(called[-1]):
        called.pop()
    return called if len(called) > 1 else thread[: (end or 0) + 1]


def _is_own(line: str) -> bool:
    return _file(line).startswith(_OWN)


def _file(line: str) -> str:
    frame = _FRAME.match(line)
    return "" if frame is None else frame["file"]


def _brief(file: str) -> str:
    return "/".join(Path(file).parts[-2:])
