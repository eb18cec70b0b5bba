"""The model of `reqtable top`: all that the screen shows. Pure data: no terminal, no socket, no clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from reqtable.control.joining import summed
from reqtable.run.top.figures import Figures, Rates
from reqtable.table.addresses import printable

SEARCH_ROWS = 1000  # how many rows a search looks through


RequestKey = tuple[str | None, int]  # the name of its server, if there are several, and its id there


class Unanswered(Exception):
    """No server has answered. The message says why, in one line."""


class Page(Enum):
    """Says what the screen shows."""

    ROWS = "rows"
    DETAIL = "detail"
    HELP = "help"


class Wanted(NamedTuple):
    """Says what to ask the servers for."""

    filters: Mapping[str, str]  # `control` is the name of a server: only its rows
    sort: str
    limit: int
    id: int | None  # of a request to show in detail, instead of the rows
    control: str | None = None  # the server of that request; None: there is only one


class Sample(NamedTuple):
    """Holds what the servers have answered. If there are several, each row and worker has its server as `control`."""

    wanted: Wanted
    at: float  # the time of the statistics, by any clock that only goes forward
    took_s: float
    stats: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]] = ()
    detail: Mapping[str, Any] | None = None  # None: not asked for, or there is no such request
    workers: Sequence[Mapping[str, Any]] = ()  # only if one is missing in the statistics
    servers: Mapping[str, Mapping[str, Any]] = {}  # if there are several: the statistics of each that has answered
    problems: Mapping[str, str] = {}  # if there are several: why the others have not


class Act(NamedTuple):
    """Names something that a key asks for: "quit", "look", "cancel" a request, or "drain" a worker or the server."""

    verb: str
    of: int | None = None
    control: str | None = None  # the name of the server; None: there is only one
    peer: str | None = None  # of the request: another server may have taken the place, and have the id, too


class Question(NamedTuple):
    """Waits for y or n."""

    text: str
    act: Act


@dataclass
class Prompt:
    """Takes a line of text, and gives it to `done`."""

    label: str
    text: str
    done: Callable[[str], Act | None]


@dataclass
class Model:
    """Holds everything that the screen shows."""

    height: int = 10  # how many rows fit on the screen
    sort: str = "age"
    filters: dict[str, str] = field(default_factory=dict)
    search: str = ""
    page: Page = Page.ROWS
    is_paused: bool = False
    prompt: Prompt | None = None
    question: Question | None = None
    message: str = ""  # what the last action has done
    problem: str = ""  # why no server answers
    sample: Sample | None = None  # the last answer
    rows: list[Mapping[str, Any]] = field(default_factory=list)
    place: int = 0  # of the selected row
    offset: int = 0  # of the first row on the screen
    opened: RequestKey | None = None  # the request on the detail page
    detail: Mapping[str, Any] | None = None  # stays when the request has ended
    has_ended: bool = False  # whether the opened request has
    scroll: int = 0  # of the detail page
    _selected: RequestKey | None = None  # the request that the selection follows; None: whatever is in that place
    _may_be_more: bool = False
    _figures: Figures = field(default_factory=Figures)

    # -- what to ask for ----------------------------------------------------------------------------------------------

    def wanted(self) -> Wanted:
        """Return what to ask the server for: the rows on the screen, and one more."""
        limit = SEARCH_ROWS if self.search else self.offset + self.height + 1
        control, id = self.opened or (None, None)
        return Wanted(dict(self.filters), self.sort, limit, id, control)

    def take(self, sample: Sample) -> None:
        """Show what the servers have answered."""
        self.problem = ""
        self._figures.take(own_stats(sample.stats), sample.at)
        self.sample = sample
        if sample.wanted.id is not None:
            if (sample.wanted.control, sample.wanted.id) == self.opened:
                self.detail, self.has_ended = sample.detail or self.detail, sample.detail is None
            return
        if (sample.wanted.filters, sample.wanted.sort) == (self.filters, self.sort):
            self._may_be_more = not self.search and len(sample.rows) >= sample.wanted.limit
            self.show(sample.rows)

    def fail(self, problem: str) -> None:
        """Say why no server answers. The last answers stay on the screen."""
        self.problem = problem

    def show(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show those of the rows that the search finds. The selection follows its request."""
        self.rows = [row for row in rows if not self.search or matches(row, self.search)]
        places = {key_of(row): place for place, row in enumerate(self.rows)}
        if self._selected in places:
            self.place = places[self._selected]
        else:
            if not self._may_be_more:  # otherwise the row may come with the next answer
                self.place = max(0, min(self.place, len(self.rows) - 1))
            row = self.selected
            self._selected = key_of(row) if row is not None and self.place else None
        self._scroll_to_place()

    # -- what the view asks -------------------------------------------------------------------------------------------

    @property
    def worker(self) -> int | None:
        """The worker whose requests and figures are shown; None: all."""
        return int(self.filters["worker"]) if "worker" in self.filters else None

    @property
    def control(self) -> str | None:
        """The server whose requests and figures are shown; None: all."""
        return self.filters.get("control")

    def is_shown(self, own: Mapping[str, Any]) -> bool:
        """Return whether the requests of a worker are shown."""
        return self.control in (None, own.get("control")) and self.worker in (None, own["worker"])

    @property
    def selected(self) -> Mapping[str, Any] | None:
        """The selected row."""
        return self.rows[self.place] if self.place < len(self.rows) else None

    def rates(self) -> Rates | None:
        """Return the sums of the rates of all workers that are shown; None if none is known yet."""
        return self._figures.rates(self.control, self.worker)

    def rates_of(self, own: Mapping[str, Any]) -> Rates | None:
        """Return the rates of one worker."""
        return self._figures.rates(own.get("control"), own["worker"])

    def stats(self) -> Mapping[str, Any]:
        """Return the statistics of what is shown: of a worker, of a server, or of all. Empty if there are none."""
        if self.sample is None or not own_stats(self.sample.stats):  # no worker has answered
            return {}
        if self.worker is None and self.control is None:
            return self.sample.stats
        own = [each for each in own_stats(self.sample.stats) if self.is_shown(each)]
        return own[0] if len(own) == 1 else summed([[each] for each in own]) if own else {}

    def controls(self) -> list[str]:
        """Return the names of the servers, if there are several."""
        return [] if self.sample is None else sorted([*self.sample.servers, *self.sample.problems])

    def stuck(self) -> list[Mapping[str, Any]]:
        """Return the workers that do not answer."""
        return [] if self.sample is None else [each for each in self.sample.workers if each["is_stuck"]]

    def worker_pids(self, control: str | None = None) -> list[int]:
        """Return the process numbers of all workers of a server, or of all; the stuck ones included."""
        if self.sample is None:
            return []
        every = [*own_stats(self.sample.stats), *self.stuck()]
        return sorted({each["worker"] for each in every if control in (None, each.get("control"))})

    def choices(self) -> list[tuple[str | None, int | None]]:
        """Return what can be shown alone: each of several servers, and each of several workers of a server."""
        found: list[tuple[str | None, int | None]] = []
        controls: Sequence[str | None] = self.controls() or (None,)
        for control in controls:
            pids = self.worker_pids(control)
            found += [] if control is None else [(control, None)]
            found += [(control, pid) for pid in pids if len(pids) > 1]
        return found

    # -- the selection ------------------------------------------------------------------------------------------------

    def move(self, by: int) -> None:
        """Move the selection: past the rows that are there, if the server may have more."""
        most = self.place + by if self._may_be_more else len(self.rows) - 1
        self.place = max(0, min(self.place + by, most))
        row = self.selected
        self._selected = key_of(row) if row is not None and self.place else None
        self._scroll_to_place()

    @property
    def lacks_rows(self) -> bool:
        """Whether the selection has come to the last row that is there, and the server may have more."""
        return self._may_be_more and self.place + 1 >= len(self.rows)

    def go_to_top(self) -> None:
        self.place = self.offset = 0
        self._selected = None

    def resize(self, height: int) -> None:
        """Say how many rows fit on the screen."""
        self.height = height
        self._scroll_to_place()

    def _scroll_to_place(self) -> None:
        self.offset = max(0, min(self.offset, self.place), self.place - self.height + 1)
        self.offset = max(0, min(self.offset, max(len(self.rows), self.place + 1) - self.height))


def own_stats(stats: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the statistics of each worker; those of the only process if it has no workers."""
    found: list[Mapping[str, Any]] = stats.get("workers", [stats])
    return [own for own in found if "worker" in own]


def key_of(row: Mapping[str, Any]) -> RequestKey:
    """Return what tells a request from all others."""
    return row.get("control"), row["id"]


def matches(row: Mapping[str, Any], text: str) -> bool:
    """Return whether a text occurs in a row, in capitals or not."""
    wanted = text.casefold()
    values = [value for name, value in row.items() if isinstance(value, str) or name in ("id", "worker")]
    return any(wanted in printable(value).casefold() for value in values)
