"""How the commands show data to people: aligned columns, short ages and sizes, and nothing that moves the cursor."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import accumulate, chain, islice, takewhile
from typing import Any, NamedTuple, TextIO

import click

from reqtable.table.addresses import printable

_COLUMNS = 80  # of a terminal that does not say how wide it is
_FIRST_ROWS = 2000  # rows that decide how wide the columns are


class Column(NamedTuple):
    """Describes a column: its heading, the cell of a row, and whether it holds numbers."""

    heading: str
    cell: Callable[[Any], str]
    is_number: bool = False


def text(value: Any) -> str:
    """Return a value as printable text; `-` for None."""
    return "-" if value is None else printable(value)


def age(seconds: float | None) -> str:
    """Return a time as `0.3s`, `42.1s`, `12m03s`, `5h07m` or `3d04h`."""
    if seconds is None:
        return "-"
    sign, seconds = ("-", -seconds) if seconds < 0 else ("", seconds)
    if seconds < 99.95:
        return f"{sign}{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{sign}{minutes}m{rest:02}s"
    hours, minutes = divmod(minutes, 60)
    return f"{sign}{hours}h{minutes:02}m" if hours < 48 else f"{sign}{hours // 24}d{hours % 24:02}h"


def brief(seconds: float) -> str:
    """Return a short time in milliseconds, as `0.31ms`, or as an age if it is long."""
    return f"{seconds * 1000:.3g}ms" if seconds < 1 else age(seconds)


def size(count: int | None) -> str:
    """Return a number of bytes as `512`, `1.2K`, `34M` or `5.0G`: powers of 1024."""
    if count is None:
        return "-"
    value, units = float(count), iter("KMGTP")
    unit = ""
    while value >= 999.5 and (more := next(units, None)):
        value, unit = value / 1024, more
    return f"{count}" if not unit else f"{value:.1f}{unit}" if value < 9.95 else f"{value:.0f}{unit}"


def width_of(cell: str) -> int:
    """Return how many columns of a terminal a text takes."""
    if cell.isascii():
        return len(cell)
    return sum(0 if unicodedata.combining(each) else 1 + (unicodedata.east_asian_width(each) in "WF") for each in cell)


def cut(line: str, width: int) -> str:
    """Return a line that takes at most `width` columns. An ellipsis stands for what was cut off."""
    if width_of(line) <= width:
        return line
    places = accumulate(map(width_of, line))
    return f"{line[: sum(1 for _ in takewhile(lambda place: place < width, places))]}…"


def terminal_width(stream: TextIO) -> int | None:
    """Return how wide a line may be on `stream`; None: as wide as it is, because no terminal shows it."""
    if not stream.isatty():
        return None
    chosen = os.environ.get("COLUMNS", "")
    if chosen.isdecimal() and int(chosen):
        return int(chosen)
    with suppress(OSError):
        return os.get_terminal_size(stream.fileno()).columns or _COLUMNS
    return _COLUMNS


def print_lines(lines: Iterable[str], err: bool = False) -> None:
    """Print lines, cut to the width of the terminal if there is one."""
    width = terminal_width(sys.stderr if err else sys.stdout)
    for line in lines:
        click.echo(line if width is None else cut(line, width), err=err)


def table(columns: Sequence[Column], rows: Iterable[Any], optional: Iterable[Column] = ()) -> Iterator[str]:
    """Yield the lines of a table, with a heading. The first rows decide how wide a column is.

    An `optional` column is left out if no one of those rows has anything in it.
    """
    waiting = iter(rows)
    first = list(islice(waiting, _FIRST_ROWS))
    left_out = set(optional)
    chosen = [each for each in columns if each not in left_out or any(each.cell(row) not in ("-", "") for row in first)]
    cells = [[each.cell(row) for each in chosen] for row in first]
    widths = [
        max(width_of(line[place]) for line in [[each.heading for each in chosen], *cells])
        for place in range(len(chosen))
    ]
    later = ([each.cell(row) for each in chosen] for row in waiting)
    for line in chain([[each.heading for each in chosen]], cells, later):
        yield "  ".join(
            _padded(cell, width, each.is_number) for cell, width, each in zip(line, widths, chosen, strict=True)
        ).rstrip()


def _padded(cell: str, width: int, is_number: bool) -> str:
    space = " " * (width - width_of(cell))
    return space + cell if is_number else cell + space


def pairs(items: Iterable[tuple[str, str]], indent: str = "") -> Iterator[str]:
    """Yield a line for each name and its value, with the values aligned."""
    found = list(items)
    width = max((len(name) for name, _ in found), default=0)
    for name, value in found:
        yield f"{indent}{name.ljust(width)}  {value}".rstrip()


def changes(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield a line for each change of the configuration."""
    for each in found:
        later = ", counts after a restart" if each.get("after_restart") else ""
        yield f"{text(each['key'])}: {text(each['before'])} -> {text(each['now'])}  ({text(each['origin'])}{later})"
    if not found:
        yield "nothing has changed"


def no_requests(ids: Sequence[int]) -> str:
    """Say that there are no requests with these ids."""
    if len(ids) == 1:
        return f"there is no request {ids[0]}: it has ended, or never was"
    return f"there are no requests {', '.join(map(str, ids))}: they have ended, or never were"
