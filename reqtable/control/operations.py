"""The operations that an operator can ask of one engine. Each is a generator, which a `Job` runs.

An operation is called with its target, its arguments as plain data, and its job. It yields plain data alone, so that a
worker can send it to its supervisor.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, Protocol

from reqtable.control import watch
from reqtable.control.detail import detail_of, pooled_thread_of, thread_stacks
from reqtable.control.jobs import PAUSE, Job
from reqtable.control.metrics import figures_of
from reqtable.control.query import GROUPS, LOOK_EVERY, Conflict, Query, QueryError, selected
from reqtable.control.recorder import recorder_of
from reqtable.control.restarts import restarted
from reqtable.control.underway import calls_of, counts_of, goes_on, known_calls, threads_of
from reqtable.dispatch.calls import Calls
from reqtable.dispatch.policies.pool import Pool
from reqtable.server.engine import Engine
from reqtable.server.operator import Operator
from reqtable.table.addresses import address_text
from reqtable.table.errors import NotMovable, ReqtableError
from reqtable.table.snapshot import handler_name
from reqtable.table.states import State
from reqtable.table.table import Entry

BATCH_ROWS = 100
_LEVELS = "debug, info, warning, error and critical"
_LOGGERS_SHOWN = 50  # in an error
_LOGGER_CHARACTERS = 200  # `logging` makes a logger for each dot in a name


@dataclass(frozen=True, slots=True)
class Target:
    """Holds what operations work on: an engine, and what steers it."""

    engine: Engine
    operator: Operator


class Changed(Protocol):
    """Describes what remembers the last change of its configuration."""

    changed_at: float | None
    changes: list[dict[str, Any]]


Operation = Callable[[Target, Mapping[str, Any], Job], Iterator[Any]]


def requests(target: Target, arguments: Mapping[str, Any], job: Job) -> Iterator[Any]:
    """Yield the rows that a query asks for, in batches."""
    table, query = target.engine.table, Query.of(arguments)
    listing, worker = query.listing(), os.getpid()
    rows: list[Any] = []
    for entry in selected(table, query, job):
        if entry is PAUSE:
            yield PAUSE
            continue
        made = listing.rows((entry,), table.running, table.clock())  # it may have ended meanwhile
        rows += [query.row(row, entry, worker) for row in made]
        if len(rows) >= BATCH_ROWS:
            yield rows
            rows = []
        elif len(rows) % LOOK_EVERY == 0 and job.is_spent:
            yield PAUSE
    if rows:
        yield rows


def groups(target: Target, arguments: Mapping[str, Any], job: Job) -> Iterator[Any]:
    """Yield, for each group of the matching requests, how many there are, and how many bytes their buffers hold."""
    given = dict(arguments)
    by = given.pop("by")
    if by not in GROUPS:
        raise QueryError(f"by={by}: there are {', '.join(GROUPS)}")
    counts: Counter[str | None] = Counter()
    held: Counter[str | None] = Counter()
    for entry in selected(target.engine.table, Query.of(given), job):
        if entry is PAUSE:
            yield PAUSE
            continue
        name = GROUPS[by](entry)
        counts[name] += 1
        held[name] += len(entry.input) + entry.output.held
    yield [{by: name, "count": counts[name], "buffered": held[name]} for name in counts]


def request(target: Target, arguments: Mapping[str, Any], job: Job) -> Iterator[Any]:
    """Yield everything about one request; None if there is none with that id."""
    entry = _entry_at(target, arguments["id"])
    yield None if entry is None else {**detail_of(target.engine, entry), "worker": os.getpid()}


def record(target: Target, arguments: Mapping[str, Any], job: Job) -> Iterator[Any]:
    """Yield the record of one request, as bytes; None if there is none with that id."""
    entry = _entry_at(target, arguments["id"])
    try:
        yield None if entry is None else target.engine.mover.record(entry).record
    except NotMovable as error:
        raise Conflict(str(error)) from None


def _entry_at(target: Target, id: int) -> Entry | None:
    entry = target.engine.table.get(id)
    return None if entry is None or entry.state is State.CLOSED else entry


def cancel(target: Target, arguments: Mapping[str, Any], job: Job) -> Iterator[Any]:
    """Cancel requests by their ids. Yields for each that was there its id, and whether its step or its call goes on.

    If a call goes on, how many threads for calls are busy is in each item, too.
    """
    cancelled: list[dict[str, Any]] = []
    table = target.engine.table
    known: set[Calls] = set()
    for id in arguments["ids"]:
        entry = table.get(id)
        is_threaded = entry is not None and pooled_thread_of(target.engine, entry) is not None
        going = [] if entry is None else [each for each in calls_of(entry) if goes_on(each)]
        if entry is not None and going and (calls := known_calls(entry)) is not None:
            known.add(calls)
        if table.cancel(id):
            cancelled.append({"id": id, "goes_on": is_threaded or bool(going)})
        if job.is_spent:
            yield PAUSE
    threads = threads_of(known)
    yield [{**each, "worker": os.getpid(), "call_threads": threads} for each in cancelled]


def stats(target: Target, arguments: Mapping[str, Any], job: Job) -> Iterator[Any]:
    """Yield the counts of each server, and what belongs to the engine."""
    # Before the rows: so the bytes of a request that ends meanwhile are counted once.
    counts: dict[Any, dict[str, Any]] = {each: each._counts.plain() for each in target.engine.servers}
    states: Counter[str] = Counter()
    for place, entry in enumerate(target.engine.table.rows()):
        states[entry.state.name] += 1
        own = counts.get(entry.server) if entry.kind == "client" else None
        if own is not None:
            own["bytes_in"] += entry.bytes_in
            own["bytes_out"] += entry.bytes_out
        if place % LOOK_EVERY == 0 and job.is_spent:
            yield PAUSE
    table = target.engine.table
    yield {
        "worker": os.getpid(),
        "entries": len(table),
        "connections": len(table.connections),
        "entries_max": table.limits.entries_max,
        "buffered_bytes": table.buffered,
        "states": dict(states),
        "is_draining": _is_draining(target),
        "restart": None if target.operator.restart is None else target.operator.restart.shown(),
        "taken": taken_of(target.operator, table.clock()),
        "loop": target.engine.loop.times.plain(),
        **last_change(target.operator, table.clock()),
        "servers": [
            {
                "server": type(each).__name__,
                "handler": handler_name(each.RequestHandlerClass),
                "address": _address_of(each),
                "pool": pool_of(each),
                "calls": counts_of(each),
                **own,
            }
            for each, own in counts.items()
        ],
    }


def taken_of(operator: Operator, now: float) -> dict[str, Any] | None:
    """Return what a process has taken over from the ones before it, when it began; None if there were none."""
    takers = operator.takers
    if not takers:
        return None
    return {
        "moved": sum(each.taken for each in takers),
        "giving": sum(not each.is_over for each in takers),  # how many of the processes before still end requests
        "longest_freeze_s": max(each.longest_freeze_s for each in takers),
        "ago_s": max(now - each.began_at for each in takers),
    }


def pool_of(server: Any) -> dict[str, int] | None:
    """Return how many threads of a server's pool are busy or idle, and how much waits for one; None: it has none."""
    pool = next((each for each in server._policies.made() if isinstance(each, Pool)), None)
    if pool is None:
        return None
    busy, idle, queued = pool.load()
    return {"size": pool.most or 0, "busy": busy, "idle": idle, "queued": queued}


def last_change(changed: Changed, now: float) -> dict[str, Any]:
    """Return what the last change of the configuration has changed, and how long ago; None: there was none."""
    at = changed.changed_at
    return {"changed_s": None if at is None else now - at, "changes": changed.changes}


def at_once(work: Callable[[Target, Mapping[str, Any]], Any]) -> Operation:
    """Return an operation that does `work` when it is asked, before its only batch is pulled.

    A worker that is stuck does it later, even if nobody waits for its answer any more: no worker misses a change.
    """

    @wraps(work)
    def operation(target: Target, arguments: Mapping[str, Any], job: Job) -> Iterator[Any]:
        try:
            return iter((work(target, arguments),))
        except ReqtableError as error:
            return _failing(error)

    return operation


def _failing(error: ReqtableError) -> Iterator[Any]:
    yield from ()
    raise error


@at_once
def config(target: Target, arguments: Mapping[str, Any]) -> Any:
    """Set what `changes` has, if there is anything. Yields every key with its value and where that comes from."""
    if arguments.get("changes"):
        target.operator.set(arguments["changes"])
    return target.operator.shown()


@at_once
def log_level(target: Target, arguments: Mapping[str, Any]) -> Any:
    """Set the level of a logger. Yields its name and its level."""
    return level_of(arguments)


def level_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Set the level of a logger of this process, if `arguments` have one.

    Returns the logger's name and level, and the level of every logger that has one of its own.
    """
    name = arguments.get("logger") or None
    if name is not None and not (isinstance(name, str) and len(name) < _LOGGER_CHARACTERS):
        raise QueryError("logger: give the name of a logger, such as reqtable")
    if name not in (None, "root") and name not in logging.Logger.manager.loggerDict:
        known = ", ".join(["root", *sorted(logging.Logger.manager.loggerDict)[:_LOGGERS_SHOWN]])
        raise QueryError(f"there is no logger {name!r}, and no such level: there are {known}; the levels are {_LEVELS}")
    logger = logging.getLogger(name)
    if arguments.get("level"):
        try:
            logger.setLevel(str(arguments["level"]).upper())
        except ValueError:
            raise QueryError(f"level={arguments['level']}: use {_LEVELS}") from None
    return {"logger": logger.name, "level": _level_text(logger.getEffectiveLevel()), "loggers": _own_levels()}


def _own_levels() -> dict[str, str]:
    known = {"root": logging.getLogger(), **logging.Logger.manager.loggerDict}
    loggers = {name: each for name, each in known.items() if isinstance(each, logging.Logger)}
    return {name: _level_text(each.level) for name, each in loggers.items() if each.level}


def _level_text(level: int) -> str:
    return logging.getLevelName(level).lower()


@at_once
def drain(target: Target, arguments: Mapping[str, Any]) -> Any:
    """Stop accepting. Unless `stay`, end once all requests are done. Yields how many requests there are."""
    if arguments.get("worker"):
        raise QueryError(f"worker={arguments['worker']}: this server has no workers")
    target.operator.drain(bool(arguments.get("stay")))
    return {"worker": os.getpid(), "entries": len(target.engine.table)}


def reload(target: Target, arguments: Mapping[str, Any], job: Job) -> Iterator[Any]:
    """Read the configuration again. Yields what has changed."""
    yield target.operator.reload()


def restart(target: Target, arguments: Mapping[str, Any], job: Job) -> Iterator[Any]:
    """Start the next version of the program, and move the requests there. Yields how that goes."""
    yield from restarted(target.operator.restart, arguments, job, target.engine.call_later)


def workers(target: Target, arguments: Mapping[str, Any], job: Job) -> Iterator[Any]:
    """Yield this process as the only worker, in the form in which a supervisor shows its workers."""
    table = target.engine.table
    yield [
        {
            "worker": os.getpid(),
            "phase": "serving",
            "age_s": table.clock() - target.operator.began_at,
            "heard_s": 0.0,
            "is_stuck": False,
            "entries": len(table),
            "buffered_bytes": table.buffered,
            "is_draining": _is_draining(target),
            "request": None,
            "stack": [],
        }
    ]


def stacks(target: Target, arguments: Mapping[str, Any], job: Job) -> Iterator[Any]:
    """Yield the stack of every thread of the process, in the form in which a supervisor shows its workers'."""
    yield [{"worker": os.getpid(), "threads": thread_stacks()}]


def machine(target: Target, arguments: Mapping[str, Any], job: Job) -> Iterator[Any]:
    """Yield the states of each handler that is a state machine, and how requests move through them."""
    yield from watch.machine(target.engine, job)


def events(target: Target, arguments: Mapping[str, Any], job: Job) -> Iterator[Any]:
    """Yield what happens to requests, in batches, for ever."""
    yield from watch.events(target.engine, arguments, job)


def metrics(target: Target, arguments: Mapping[str, Any], job: Job) -> Iterator[Any]:
    """Yield the figures of the metrics. Record for some minutes what only they need."""
    recorder_of(target.engine).look()
    for found in figures_of(target.engine, target.operator, job):
        yield PAUSE if found is PAUSE else {"worker": os.getpid(), "figures": found}


def ready(target: Target, arguments: Mapping[str, Any], job: Job) -> Iterator[Any]:
    """Yield whether new clients are welcome, in a list, as one of several workers would."""
    yield [not _is_draining(target)]


OPERATIONS: dict[str, Operation] = {
    each.__name__: each
    for each in (
        requests,
        groups,
        request,
        record,
        cancel,
        stats,
        config,
        log_level,
        drain,
        reload,
        restart,
        workers,
        stacks,
        machine,
        events,
        metrics,
        ready,
    )
}


def _is_draining(target: Target) -> bool:
    return any(each._is_draining for each in target.engine.servers)


def _address_of(server: Any) -> str:
    return address_text(getattr(server, "server_address", None))
