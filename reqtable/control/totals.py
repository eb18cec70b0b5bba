"""`Totals`: the figures of a supervisor and of all its workers, those that have ended included."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import count
from typing import Any, Protocol

from reqtable.control.figures import Figures, growing, joined_figures
from reqtable.control.workers import Caller
from reqtable.server.operator import Restarting

_REQUESTS = "reqtable_requests"
SERVING = "serving"
STUCK = "stuck"  # it serves, but does not answer


class Reporting(Protocol):
    """The part of a worker that its figures come from."""

    caller: Caller

    @property
    def pid(self) -> int: ...
    @property
    def phase_name(self) -> str: ...


class Reported(Protocol):
    """The part of a supervisor that has figures."""

    @property
    def workers(self) -> list[Any]: ...
    @property
    def restarts(self) -> Counter[str]: ...
    @property
    def reloads(self) -> Counter[str]: ...
    @property
    def restart(self) -> Restarting: ...
    @property
    def phases(self) -> tuple[str, ...]: ...


class Totals:
    """Adds up the figures of workers. A worker that does not answer counts with the last figures that it has sent."""

    def __init__(self, supervisor: Reported) -> None:
        self._supervisor = supervisor
        self._ended: Figures = {}  # of the workers that have ended
        self._last: dict[Reporting, Figures] = {}
        self._places: dict[Reporting, int] = {}  # from 1 up; another worker takes a place that is free again

    def left(self, worker: Reporting) -> None:
        """Keep the figures of a worker that has ended: its last words, or else the figures that were asked for last."""
        self._ended = joined_figures([self._ended, growing(self._known(worker))])
        self._last.pop(worker, None)
        self._places.pop(worker, None)

    def whole(self, batches: list[list[Any]]) -> Figures:
        """Return the sums. `batches` has the figures of each worker that has answered, with its process number."""
        answered: Mapping[int, Figures] = {found["worker"]: found["figures"] for [found] in batches}
        workers: list[Reporting] = list(self._supervisor.workers)
        for each in workers:
            if each.pid in answered:
                self._last[each] = answered[each.pid]
            self._take_place(each)
        parts = [self._placed(each) for each in workers if self._known(each)]
        return joined_figures([self._ended, *parts, self._own(workers, answered)])

    def _known(self, worker: Reporting) -> Figures:
        """Return the newest figures of a worker that are known: its last words, if it has said them."""
        return worker.caller.last_words or self._last.get(worker, {})

    def _take_place(self, worker: Reporting) -> None:
        """Give a worker its place for good, also one that has never answered: so it keeps its label when it does."""
        if worker not in self._places:
            taken = {place for each, place in self._places.items() if each.caller.line.is_open}  # else it has ended
            self._places[worker] = next(each for each in count(1) if each not in taken)

    def _placed(self, worker: Reporting) -> Figures:
        """Return the figures of a worker, with its place in the labels of its requests."""
        figures = self._known(worker)
        place = str(self._places[worker])
        return {**figures, _REQUESTS: {(*labels[:-1], place): n for labels, n in figures[_REQUESTS].items()}}

    def _own(self, workers: list[Reporting], answered: Mapping[int, Figures]) -> Figures:
        """Return what the supervisor itself knows."""
        phases = Counter(dict.fromkeys([*self._supervisor.phases, STUCK], 0))
        for each in workers:
            is_stuck = each.phase_name == SERVING and each.pid not in answered
            phases[STUCK if is_stuck else each.phase_name] += 1
        return {
            "reqtable_workers": {(phase,): n for phase, n in phases.items()},
            "reqtable_worker_restarts_total": {(reason,): n for reason, n in self._supervisor.restarts.items()},
            "reqtable_restarts_total": {(result,): n for result, n in self._supervisor.restart.counts.items()},
            "reqtable_config_reloads_total": {(result,): n for result, n in self._supervisor.reloads.items()},
        }
