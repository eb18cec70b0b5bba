"""The figures of one engine. `docs/reference/control-api.md` says what each of them means."""

from __future__ import annotations

import socket
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from reqtable.control.figures import Figures, Value
from reqtable.control.jobs import PAUSE, Job, Turns
from reqtable.control.query import LOOK_EVERY
from reqtable.control.recorder import recorder_of
from reqtable.control.underway import counts_of
from reqtable.dispatch.calls import PHASES
from reqtable.dispatch.policies.pool import Pool
from reqtable.server.engine import Engine
from reqtable.server.operator import Operator
from reqtable.server.stats import Counts
from reqtable.table.states import Ending, State

ONLY_PLACE = "1"  # the label "worker" of a process without workers; a supervisor gives each of its workers another
REFUSALS = ("entries_max", "entries_per_peer_max", "buffered_bytes_max", "evicted")
_SHOWN_STATES = [state.name for state in State if state is not State.CLOSED]
_QUEUE = struct.Struct("24x2I")  # struct tcp_info in linux/tcp.h: tcpi_unacked, tcpi_sacked


def figures_of(engine: Engine, operator: Operator, job: Job) -> Iterator[Any]:
    """Yield PAUSE in between, then the figures of an engine."""
    recorder = recorder_of(engine)
    # Before the rows: so the bytes of a request that ends meanwhile are counted once.
    figures = {**_counted(recorder.counts_of(engine.servers)), **_measured(engine, operator)}
    received, sent = (figures[f"reqtable_{each}_bytes_total"] for each in ("received", "sent"))
    states: Counter[tuple[str, ...]] = Counter()
    for server in engine.servers:
        name = recorder.name_of(server.RequestHandlerClass)
        states.update(dict.fromkeys(((state, name, type(server).__name__, ONLY_PLACE) for state in _SHOWN_STATES), 0))
    for place, entry in enumerate(engine.table):
        if place % LOOK_EVERY == 0 and job.is_spent:
            yield PAUSE
        received[()] += entry.bytes_in  # type: ignore[operator]  # a number
        sent[()] += entry.bytes_out  # type: ignore[operator]  # a number
        if entry.state is not State.CLOSED:
            name = recorder.name_of(entry.handler)
            states[entry.state.name, name, type(entry.server).__name__, ONLY_PLACE] += 1
    yield {**figures, "reqtable_requests": dict(states), **recorder.figures()}


def last_figures_of(engine: Engine, operator: Operator) -> Figures:
    """Return the figures of an engine whose loop has ended."""
    job = Job(Turns(engine.post))
    [figures] = [each for each in figures_of(engine, operator, job) if each is not PAUSE]
    return figures  # type: ignore[no-any-return]  # a job yields PAUSE, too


def _counted(counts: list[Counts]) -> Figures:
    """Return what servers have counted of the requests that have ended."""
    accepted, received, sent = 0, 0, 0
    finished: Counter[tuple[str, ...]] = Counter()
    refused: Counter[tuple[str, ...]] = Counter(dict.fromkeys(((reason,) for reason in REFUSALS), 0))
    for each in counts:
        for reason, count in each.refused.items():
            refused[reason,] += count
        for policy, tally in dict(each.policies).items():
            accepted += tally.accepted
            received += tally.bytes_in
            sent += tally.bytes_out
            for ending in Ending:
                finished[ending.value, policy] += tally.finished[ending]
    return {
        "reqtable_requests_accepted_total": {(): accepted},
        "reqtable_requests_finished_total": dict(finished),
        "reqtable_requests_refused_total": dict(refused),
        "reqtable_received_bytes_total": {(): received},
        "reqtable_sent_bytes_total": {(): sent},
    }


def _measured(engine: Engine, operator: Operator) -> Figures:
    """Return what is known of an engine without a look at its rows."""
    times, table = engine.loop.times, engine.table
    return {
        "reqtable_connections": {(): len(table.connections)},
        "reqtable_buffered_bytes": {(): table.buffered},
        "reqtable_loop_lag_seconds": {(): [times.due, times.lag_s]},
        "reqtable_loop_lag_max_seconds": {(): times.lag_s_max},
        "reqtable_loop_busy_seconds_total": {(): times.busy_s},
        "reqtable_loop_passes_total": {(): times.passes},
        "reqtable_config_reloads_total": {(result,): count for result, count in operator.reloads.items()},
        "reqtable_restarts_total": {(result,): count for result, count in _restarts(operator).items()},
        "reqtable_requests_taken_total": {(): engine.taken_over + sum(each.taken for each in operator.takers)},
        "reqtable_restart_freeze_max_seconds": {
            (): max([each.longest_freeze_s for each in operator.takers], default=0.0)
        },
        **_pools(engine),
        "reqtable_calls": _calls(engine),
        **_listen_queues(engine),
    }


def _restarts(operator: Operator) -> Counter[str]:
    return Counter(done=0, failed=0) if operator.restart is None else operator.restart.counts


def _pools(engine: Engine) -> Figures:
    servers: list[Any] = list(engine.servers)
    pools = [each for server in servers for each in server._policies.made() if isinstance(each, Pool)]
    if not pools:
        return {}
    loads = [each.load() for each in pools]
    busy, idle, waiting = (sum(column) for column in zip(*loads, strict=True))
    return {
        "reqtable_pool_threads": {("busy",): busy, ("idle",): idle},
        "reqtable_pool_queue": {(): waiting},
    }


def _calls(engine: Engine) -> dict[tuple[str, ...], Value]:
    found: Counter[tuple[str, ...]] = Counter()
    servers: list[Any] = list(engine.servers)
    for server in servers:
        for executor, counts in counts_of(server).items():
            found.update({(executor, phase): counts[phase] for phase in PHASES})
    return {**found}


def _listen_queues(engine: Engine) -> Figures:
    """Return how full the kernel's queues are, as far as the kernel tells: for TCP on Linux (tcp(7), TCP_INFO)."""
    lengths: Counter[tuple[str, ...]] = Counter()
    limits: Counter[tuple[str, ...]] = Counter()
    for server in engine.servers:
        own: Any = getattr(server, "socket", None)
        if _is_tcp(own) and own.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            length, limit = _QUEUE.unpack(own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _QUEUE.size))
            lengths[type(server).__name__,] += length
            limits[type(server).__name__,] += limit
    return {"reqtable_listen_queue": {**lengths}, "reqtable_listen_queue_limit": {**limits}}


def _is_tcp(own: Any) -> bool:
    if not sys.platform.startswith("linux") or not isinstance(own, socket.socket) or own.fileno() < 0:
        return False
    return own.family in (socket.AF_INET, socket.AF_INET6) and own.type == socket.SOCK_STREAM
