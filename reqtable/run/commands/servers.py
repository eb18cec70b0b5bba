"""`Servers`: what `reqtable top` asks. It joins the answers of several servers into one."""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TypeVar

import click

from reqtable.control.joining import summed
from reqtable.control.query import ROW_ORDERS
from reqtable.control.workers import ANSWER_S
from reqtable.run.commands.asking import Asked
from reqtable.run.commands.finding import found_paths
from reqtable.run.top.model import Act, Sample, Unanswered, Wanted, own_stats
from reqtable.table.words import counted

_NOT_FOUND = 404
_T = TypeVar("_T")


class Servers:
    """Asks the servers at some control sockets, or all servers of this user that run if there are no paths.

    Several servers have names, by which the rows of an answer, and actions, say which server they belong to.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths
        self._asked = self._find()

    def look(self, wanted: Wanted) -> Sample:
        """Return what the servers answer. Raises Unanswered if none does. Looks anew for servers that have ended."""
        found = _each(self._asked, lambda name, asked: _look(asked, _wanted_of(wanted, name)))
        samples = {name: each for name, each in found.items() if isinstance(each, Sample)}
        problems = {name: each.format_message() for name, each in found.items() if not isinstance(each, Sample)}
        if problems:
            self._find_again()
        if not samples:
            raise Unanswered("; ".join(problems.values()))
        return samples.get(None) or _joined(wanted, samples, problems)  # type: ignore[arg-type]

    def act(self, act: Act) -> str:
        """Have a server do what a key has asked for. Returns what was done. Raises Unanswered."""
        asked = self._asked.get(act.control)
        if asked is None:
            raise Unanswered(f"{act.control} has ended")
        try:
            return _acted(asked, act)
        except click.ClickException as error:
            raise Unanswered(error.format_message()) from None

    def tell_missing(self) -> None:
        """Say on standard error which workers the answers lack."""
        for each in self._asked.values():
            each.tell_missing()

    def _find(self) -> dict[str | None, Asked]:
        paths = self._paths or found_paths()
        names: Sequence[str | None] = (None,) if len(paths) == 1 else _names(paths)
        return {name: Asked(path) for name, path in zip(names, paths, strict=True)}

    def _find_again(self) -> None:
        with suppress(click.ClickException):  # none runs now
            self._asked = self._find()


def _names(paths: Sequence[str]) -> list[str]:
    """Return the name of each socket, without its folder. If two have the same name, the second gets a number."""
    names: list[str] = []
    for path in paths:
        name = stem = Path(path).stem
        number = 1
        while name in names:
            number += 1
            name = f"{stem}-{number}"
        names.append(name)
    return names


def _each(
    asked: Mapping[str | None, Asked], ask: Callable[[str | None, Asked], _T]
) -> dict[str | None, _T | click.ClickException]:
    """Ask all servers at the same time, so that one that is held up does not hold up the answers of others."""
    found: dict[str | None, _T | click.ClickException] = {}
    unforeseen: list[BaseException] = []

    def run(name: str | None, each: Asked) -> None:
        try:
            found[name] = ask(name, each)
        except click.ClickException as error:
            found[name] = error
        except BaseException as error:  # a defect: it is raised where the answers are awaited
            unforeseen.append(error)

    threads = [threading.Thread(target=run, args=item, daemon=True) for item in asked.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if unforeseen:
        raise unforeseen[0]
    return {name: found[name] for name in asked}


def _wanted_of(wanted: Wanted, name: str | None) -> Wanted:
    """Return what is wanted of one server: no rows if only those of another one are shown."""
    filters = dict(wanted.filters)
    control = filters.pop("control", None) if wanted.id is None else wanted.control
    if name is None or control in (None, name):
        return wanted._replace(filters=filters)
    return wanted._replace(filters=filters, id=None, limit=0)


def _look(server: Asked, wanted: Wanted) -> Sample:
    """Ask for the statistics, and for the rows or one request. Only if a worker seems stuck, ask for the workers."""
    began = time.monotonic()
    stats = server.get("/v1/stats")
    at = time.monotonic()
    sample = Sample(wanted, at, at - began, stats)
    if wanted.id is not None:
        sample = sample._replace(detail=server.find(f"/v1/requests/{wanted.id}"))
    elif wanted.limit:
        rows = server.get("/v1/requests", sort=wanted.sort, limit=wanted.limit, **wanted.filters)
        sample = sample._replace(rows=rows)
    if time.monotonic() - began > ANSWER_S:
        sample = sample._replace(workers=server.get("/v1/workers"))
    return sample


def _joined(wanted: Wanted, samples: Mapping[str, Sample], problems: Mapping[str, str]) -> Sample:
    """Return the answers of several servers as one."""
    own = [
        {**each, "control": name, "at": sample.at}
        for name, sample in samples.items()
        for each in own_stats(sample.stats)
    ]
    rows = [[{**row, "control": name} for row in sample.rows] for name, sample in samples.items()]
    details = [{**sample.detail, "control": name} for name, sample in samples.items() if sample.detail is not None]
    return Sample(
        wanted,
        max(each.at for each in samples.values()),
        max(each.took_s for each in samples.values()),
        summed([[each] for each in own]),
        list(islice(heapq.merge(*rows, key=ROW_ORDERS[wanted.sort]), wanted.limit)),
        details[0] if details else None,
        [{**each, "control": name} for name, sample in samples.items() for each in sample.workers],
        {name: each.stats for name, each in samples.items()},
        problems,
    )


def _acted(server: Asked, act: Act) -> str:
    """Have the server do what a key has asked for. Returns what was done."""
    if act.verb == "cancel":
        row = server.find(f"/v1/requests/{act.of}")
        if row is None or row["peer"] != act.peer:
            return f"request {act.of} had ended already"
        answer = server.send("POST", "/v1/requests/cancel", {"ids": [act.of]}, also=_NOT_FOUND)
        return f"ended request {act.of}" if answer["cancelled"] else f"request {act.of} had ended already"
    answer = server.send("POST", "/v1/drain", {} if act.of is None else {"worker": act.of})
    if act.of is not None:
        return f"worker {act.of} drains, and another one takes its place"
    return f"the server drains: {counted(answer['entries'], 'request')} in progress"
