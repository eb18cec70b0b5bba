"""No work of an engine grows faster than the logarithm of its rows, unless it is for all of them.

Bytecodes and bytes are counted, because times are not exact. Bytecodes show a loop in Python; a list or a dict that C
fills with something of each row shows as bytes.
"""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from math import log

import pytest

from reqtable.server import admission
from reqtable.table.gradually import SLICE_ROWS
from tests.benchmarks.profile import Bytecodes
from tests.benchmarks.rows import IN_FULL, OLDEST, WORKS, Do, Rows, measure, table_of

FEW, MANY = 300, 4_800
GROWTH = log(MANY) / log(FEW)
ROOM_BYTES = 1_024  # for what differs by chance
ALSO: dict[str, Callable[[Rows], Do]] = {
    "one row is looked at": lambda rows: lambda: next(iter(rows.table)),
    "one id is looked at": lambda rows: lambda: next(rows.table.rows()),
}


@pytest.fixture(scope="module")
def both() -> Iterator[list[Rows]]:
    with pytest.MonkeyPatch.context() as unchecked:
        unchecked.delenv("REQTABLE_DEBUG", raising=False)
        with Rows(FEW) as few, Rows(MANY) as many:
            for rows in (few, many):
                rows.arm_all()
            yield [few, many]


def bytecodes_of(do: Do) -> int:
    bytecodes = Bytecodes()
    outer = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # on 3.12, a frame must have asked for opcodes before settrace
    sys.settrace(bytecodes.trace)
    bytecodes.is_on = True
    try:
        do()
    finally:
        bytecodes.is_on = False
        sys.settrace(outer)
    return bytecodes.counts.total()


def _do_all(works: Iterable[Callable[[], Do]]) -> None:
    for work in works:
        work()()


def bytes_of(do: Do) -> int:
    """Return how many bytes more there are at the most, while something is done."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        do()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", [*WORKS, *ALSO])
def test_no_work_grows_faster_than_the_logarithm_of_the_rows(both: list[Rows], name: str) -> None:
    works = WORKS | ALSO
    for rows in both:
        works[name](rows)()  # what is made once is made
    few, many = (bytecodes_of(works[name](rows)) for rows in both)
    assert 0 < many <= few * GROWTH
    few, many = (bytes_of(works[name](rows)) for rows in both)
    assert many <= few + ROOM_BYTES
    assert [len(rows.table) for rows in both] == [FEW, MANY]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", IN_FULL)
def test_replacing_a_request_takes_the_same_time_however_many_there_are(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(admission, "_FOUND_MIN", 1)
    costs = []
    for count in (640, 2_560):
        with Rows(count) as rows:
            rows.fill()
            works = [partial(IN_FULL[name], rows) for _ in range(count // 64)]
            costs.append(bytecodes_of(partial(_do_all, works)) / len(works))
            assert len(rows.table) == count
            assert rows.server.stats()["refused"] == {"evicted": len(works)}
    few, many = costs
    assert few * 0.9 < many < few * 1.1


def test_the_oldest_rows_are_the_first_of_all(both: list[Rows]) -> None:
    for rows in both:
        listed = [row["id"] for row in rows.table.snapshot()]
        for limit in (0, 1, OLDEST, SLICE_ROWS, SLICE_ROWS + 1, len(rows.table), len(rows.table) + 1):
            assert [row["id"] for row in rows.table.snapshot(limit=limit)] == listed[:limit]


def test_the_table_of_what_rows_cost_has_a_line_for_each_work() -> None:
    found = {count: dict.fromkeys(WORKS, count / 100) for count in (100, 250)}
    lines = table_of(found).splitlines()
    assert lines[0] == "|  | 100 rows | 250 rows | growth |"
    assert lines[2] == "| a pass with nothing to do, µs | 1 | 2.5 | 2.5 x |"
    assert len(lines) == 2 + len(WORKS)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_a_hundred_thousand_rows_take_less_than_1_200_bytes_each() -> None:
    assert measure(100_000)["memory of a row, bytes"] < 1_200
