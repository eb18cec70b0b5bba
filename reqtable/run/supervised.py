"""The control API of a supervisor: its workers know the requests, and it knows the workers."""

from __future__ import annotations

import faulthandler
import os
import signal
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, BinaryIO, Protocol

from reqtable.config import Config, effective
from reqtable.control.jobs import END, Failed, Job, Then, Turns
from reqtable.control.joining import (
    first_found,
    joined,
    sorted_rows,
    summed,
    summed_groups,
    summed_machines,
    summed_taken,
)
from reqtable.control.operations import last_change, level_of
from reqtable.control.query import Query, QueryError
from reqtable.control.restarts import restarted
from reqtable.control.source import Asking
from reqtable.control.totals import Reported, Totals
from reqtable.control.workers import STUCK, Caller, Chained, Gathered, Merged
from reqtable.run.stall_page import StallPage
from reqtable.server.engine import Engine
from reqtable.server.operator import Restarting
from reqtable.table.errors import ConfigurationError

STACK_SIGNAL = getattr(signal, "SIGRTMIN", 0) + 2  # a worker writes the stacks of its threads when it gets this
_STACK_S = 0.1  # how long that may take
_STACK_BYTES = 65_536


class StackFile:
    """Takes the stacks of a worker that is stuck: the interpreter writes them from a signal handler of its own."""

    def __init__(self) -> None:
        # In memory, where there is such a thing: a user may have no folder to write to.
        self._file: BinaryIO = (
            open(os.memfd_create("stacks"), "r+b", buffering=0)  # noqa: SIM115  # `close` closes it
            if hasattr(os, "memfd_create")
            else tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        )
        self.page = StallPage()

    def register(self, engine: Engine) -> None:
        """In the worker: write the stacks of all threads whenever STACK_SIGNAL comes, and note what stalls the loop."""
        engine.loop.on_stall = self.page.note
        faulthandler.register(STACK_SIGNAL, self._file, all_threads=True)

    def clear(self) -> None:
        os.ftruncate(self._file.fileno(), 0)
        os.lseek(self._file.fileno(), 0, os.SEEK_SET)  # the worker shares the position

    def lines(self) -> list[str]:
        """Return what the worker has written, line by line."""
        data = os.pread(self._file.fileno(), _STACK_BYTES, 0)
        return data.decode("utf-8", "replace").splitlines()

    def close(self) -> None:
        self._file.close()
        self.page.close()


class Supervised(Protocol):
    """Describes a worker as its supervisor knows it."""

    started_at: float
    heard_at: float
    caller: Caller
    stacks: StackFile

    @property
    def pid(self) -> int: ...
    @property
    def phase_name(self) -> str: ...
    def tell(self, number: int) -> None: ...


class Supervising(Reported, Protocol):
    """The part of a supervisor that its control API steers."""

    changed_at: float | None
    changes: list[dict[str, Any]]
    is_accepting: bool

    @property
    def engine(self) -> Engine: ...
    @property
    def config(self) -> Config: ...
    @property
    def restart(self) -> Restarting: ...
    @property
    def on_worker(self) -> list[Callable[[Any], Any]]: ...
    @property
    def on_worker_end(self) -> list[Callable[[Any], Any]]: ...
    def set_config(self, changes: Mapping[str, Any]) -> None: ...
    def ask_reload(self) -> list[dict[str, Any]] | ConfigurationError: ...
    def begin_drain(self) -> None: ...
    def replace_worker(self, worker: Any) -> None: ...


class SupervisorSource:
    """Answers for a supervisor and its workers."""

    def __init__(self, supervisor: Supervising) -> None:
        self._supervisor = supervisor
        self._totals = Totals(supervisor)
        self._turns = Turns(supervisor.engine.post)
        supervisor.on_worker_end.append(self._totals.left)

    def ask(self, operation: str, arguments: Mapping[str, Any]) -> Asking:
        own: Callable[[Mapping[str, Any]], Asking] | None = getattr(self, f"_{operation}", None)
        if own is not None:
            return own(arguments)
        return self._gather(operation, arguments, joined)

    def _gather(
        self, operation: str, arguments: Mapping[str, Any], combine: Callable[[list[list[Any]]], Any]
    ) -> Gathered:
        return Gathered([each.caller.ask(operation, arguments) for each in self._supervisor.workers], combine)

    def _answer(self, batch: Any) -> Asking:
        return _Answer(self._supervisor.engine, batch)

    # -- the operations that are not just asked of each worker --------------------------------------------------------

    def _requests(self, arguments: Mapping[str, Any]) -> Asking:
        query = Query.of(arguments)
        if query.sort is not None:
            return self._gather("requests", arguments, partial(sorted_rows, query))
        return Chained([each.caller.ask("requests", arguments) for each in self._supervisor.workers], query.limit)

    def _groups(self, arguments: Mapping[str, Any]) -> Asking:
        return self._gather("groups", arguments, partial(summed_groups, arguments["by"]))

    def _request(self, arguments: Mapping[str, Any]) -> Asking:
        return self._gather("request", arguments, first_found)

    def _record(self, arguments: Mapping[str, Any]) -> Asking:
        return self._gather("record", arguments, first_found)

    def _stats(self, arguments: Mapping[str, Any]) -> Asking:
        return self._gather("stats", arguments, self._summed_stats)

    def _summed_stats(self, batches: list[list[Any]]) -> dict[str, Any]:
        """Return the sums over all workers, with the last change that the supervisor knows: workers come and go."""
        for [own] in batches:
            del own["changed_s"], own["changes"], own["restart"]
        supervisor = self._supervisor
        taken = summed_taken([own.pop("taken") for [own] in batches])
        whole = {**summed(batches), "restart": supervisor.restart.shown(), "taken": taken}
        return {**whole, **last_change(supervisor, supervisor.engine.table.clock())}

    def _machine(self, arguments: Mapping[str, Any]) -> Asking:
        return self._gather("machine", arguments, summed_machines)

    def _metrics(self, arguments: Mapping[str, Any]) -> Asking:
        return self._gather("metrics", arguments, lambda batches: {"figures": self._totals.whole(batches)})

    def _ready(self, arguments: Mapping[str, Any]) -> Asking:
        askings = [each.caller.ask("ready", arguments) for each in self._supervisor.workers]
        return Gathered(askings, joined, is_enough=any)

    def _events(self, arguments: Mapping[str, Any]) -> Asking:
        askings = [each.caller.ask("events", arguments) for each in self._supervisor.workers]
        engine = self._supervisor.engine
        return Merged(
            engine, askings, lambda worker: worker.caller.ask("events", arguments), self._supervisor.on_worker
        )

    def _log_level(self, arguments: Mapping[str, Any]) -> Asking:
        own = level_of(arguments)  # workers that start later have it, too
        return self._gather("log_level", arguments, lambda _: own)

    def _config(self, arguments: Mapping[str, Any]) -> Asking:
        if arguments.get("changes"):
            self._supervisor.set_config(arguments["changes"])
            return self._gather("config", arguments, lambda _: self._shown())
        return self._answer(self._shown())

    def _shown(self) -> list[dict[str, Any]]:
        return [
            {"key": key, "value": value, "origin": origin} for key, value, origin in effective(self._supervisor.config)
        ]

    def _reload(self, arguments: Mapping[str, Any]) -> Asking:
        found = self._supervisor.ask_reload()
        return self._answer(Failed(found) if isinstance(found, ConfigurationError) else found)

    def _drain(self, arguments: Mapping[str, Any]) -> Asking:
        if arguments.get("worker"):
            self._supervisor.replace_worker(self._worker(arguments["worker"]))
            return self._answer({"worker": arguments["worker"]})
        self._supervisor.is_accepting = False
        answers = self._gather("drain", {"stay": True}, _counted)
        if not arguments.get("stay"):
            self._supervisor.begin_drain()
        return answers

    def _restart(self, arguments: Mapping[str, Any]) -> Asking:
        engine = self._supervisor.engine
        job = Job(self._turns)
        return job.begin(restarted(self._supervisor.restart, arguments, job, engine.call_later))

    def _worker(self, pid: Any) -> Any:
        for each in self._supervisor.workers:
            if str(each.pid) == str(pid):
                return each
        raise QueryError(
            f"worker={pid}: the workers are {', '.join(str(each.pid) for each in self._supervisor.workers)}"
        )

    def _workers(self, arguments: Mapping[str, Any]) -> Asking:
        return _Workers(self._supervisor)


class _Answer:
    """One batch that is there already."""

    def __init__(self, engine: Engine, batch: Any) -> None:
        self._engine = engine
        self._batches = [batch]

    def pull(self, then: Then) -> None:
        self._engine.post(then, self._batches.pop() if self._batches else END)

    def close(self) -> None:
        pass


class _Workers:
    """Asks each worker for its figures, and those that do not answer for their stacks."""

    def __init__(self, supervisor: Supervising) -> None:
        self._supervisor = supervisor
        self._workers: list[Supervised] = list(supervisor.workers)
        self._askings = [each.caller.ask("stats", {}) for each in self._workers]
        self._found: dict[int, dict[str, Any]] = {}
        self._is_done = False
        self._then: Then | None = None

    def pull(self, then: Then) -> None:
        if self._is_done:
            self._supervisor.engine.post(then, END)
            return
        self._then = then
        for worker, asking in list(zip(self._workers, self._askings, strict=True)):
            asking.pull(partial(self._came, worker))
        self._answer_if_whole()

    def close(self) -> None:
        self._then = None
        for asking in self._askings:
            asking.close()

    def _came(self, worker: Supervised, batch: Any) -> None:
        if batch is STUCK and worker.caller.line.is_open:
            worker.stacks.clear()
            worker.tell(STACK_SIGNAL)
            self._supervisor.engine.call_later(_STACK_S, self._note, worker, None)
        else:
            self._note(worker, None if batch is END or isinstance(batch, Failed) else batch)

    def _note(self, worker: Supervised, stats: dict[str, Any] | None) -> None:
        if worker.caller.line.is_open:
            self._found[worker.pid] = self._row(worker, stats)
        else:  # it has ended meanwhile
            self._workers.remove(worker)
        self._answer_if_whole()

    def _answer_if_whole(self) -> None:
        if len(self._found) == len(self._workers) and self._then is not None:
            then, self._then = self._then, None
            self._is_done = True
            then([self._found[each.pid] for each in self._workers])

    def _row(self, worker: Supervised, stats: dict[str, Any] | None) -> dict[str, Any]:
        now = self._supervisor.engine.table.clock()
        return {
            "worker": worker.pid,
            "phase": worker.phase_name,
            "age_s": now - worker.started_at,
            "heard_s": now - worker.heard_at,
            "is_stuck": stats is None,
            "entries": None if stats is None else stats["entries"],
            "buffered_bytes": None if stats is None else stats["buffered_bytes"],
            "is_draining": None if stats is None else stats["is_draining"],
            "request": worker.stacks.page.request() if stats is None else None,
            "stack": worker.stacks.lines() if stats is None else [],
        }


def _counted(batches: list[list[Any]]) -> dict[str, Any]:
    return {"entries": sum(found["entries"] for [found] in batches)}
