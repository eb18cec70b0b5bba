"""Makes rates of the counts of a server: what each worker did between two looks at it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Counted:
    """Holds the counts of one worker at one moment. They only grow while the worker lives."""

    at: float
    accepted: int
    finished: Counter[str]
    refused: int
    bytes_in: int
    bytes_out: int
    busy_s: float
    passes: int
    due: int
    lag_s: float

    @classmethod
    def of(cls, own: Mapping[str, Any], at: float) -> Counted:
        """Return the counts in the statistics of one worker."""
        servers, loop = own["servers"], own["loop"]
        finished: Counter[str] = Counter()
        for each in servers:
            finished.update(each["finished"])
        return cls(
            at,
            sum(each["accepted"] for each in servers),
            finished,
            sum(sum(each["refused"].values()) for each in servers),
            sum(each["bytes_in"] for each in servers),
            sum(each["bytes_out"] for each in servers),
            loop["busy_s"],
            loop["passes"],
            loop["due"],
            loop["lag_s"],
        )


@dataclass(slots=True)
class Rates:
    """Says what happened in a second, in one worker or in several."""

    accepted: float = 0.0
    finished: Counter[str] = field(default_factory=Counter)  # by ending; the values are rates
    refused: float = 0.0
    bytes_in: float = 0.0
    bytes_out: float = 0.0
    busy: float = 0.0  # the share of the time in which the loop worked: up to 1 for each worker
    passes: float = 0.0
    due: float = 0.0
    lag: float = 0.0  # seconds by which timers were late

    @classmethod
    def between(cls, before: Counted, now: Counted) -> Rates:
        """Return the rates between two moments of one worker."""
        seconds = max(now.at - before.at, 1e-9)

        def rate(name: str) -> float:
            return float(max(0.0, (getattr(now, name) - getattr(before, name)) / seconds))

        finished: Counter[str] = Counter()
        for ending, count in (now.finished - before.finished).items():
            finished[ending] = count / seconds  # type: ignore[assignment]
        others = {name: rate(name) for name in ("accepted", "refused", "bytes_in", "bytes_out", "passes", "due")}
        return cls(**others, finished=finished, busy=rate("busy_s"), lag=rate("lag_s"))

    def __add__(self, other: Rates) -> Rates:
        return Rates(**{name: getattr(self, name) + getattr(other, name) for name in self.__slots__})

    @property
    def pass_s(self) -> float | None:
        """How long a pass of the loop took on average; None if there was none."""
        return self.busy / self.passes if self.passes else None

    @property
    def late_s(self) -> float | None:
        """How late a timer or a deadline fired on average; None if none did."""
        return self.lag / self.due if self.due else None


Worker = tuple[str | None, int]  # the name of its server, if there are several, and its process number


class Figures:
    """Remembers the counts of each worker, and gives the rates since the look before."""

    def __init__(self) -> None:
        self._known: dict[Worker, Counted] = {}
        self._rates: dict[Worker, Rates] = {}

    def take(self, workers: Iterable[Mapping[str, Any]], at: float) -> None:
        """Take the statistics of all workers that have answered.

        A worker that is new has no rates yet: when its counts began is not known. One that has ended is forgotten.
        """
        now = {(own.get("control"), own["worker"]): Counted.of(own, own.get("at", at)) for own in workers}
        self._rates = {
            worker: Rates.between(self._known[worker], counts)
            for worker, counts in now.items()
            if worker in self._known
        }
        self._known = now

    def rates(self, control: str | None = None, worker: int | None = None) -> Rates | None:
        """Return the sums of the rates of one worker, of one server, or of all; None if none is known yet."""
        whole = None
        for (server, pid), each in self._rates.items():
            if control in (None, server) and worker in (None, pid):
                whole = each if whole is None else whole + each
        return whole
