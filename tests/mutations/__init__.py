"""Deliberate bugs. The simulation must find them, or it proves nothing.

Each bug is a change to the source of one function of the package. `applied` replaces the function by the changed one.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from reqtable.dispatch.green.socket import CooperativeSocket
from reqtable.dispatch.remote_steps import RemoteSteps
from reqtable.handlers.resumable import ResumableHandler
from reqtable.loop.ending import Endings
from reqtable.loop.failures import Failures
from reqtable.loop.outputs import Outputs
from reqtable.loop.sides import Sides
from reqtable.loop.step import Steps
from reqtable.loop.waiting import Waiting
from reqtable.net.attempts import Attempts
from reqtable.net.connect import BegunConnect, Connector
from reqtable.net.datagram import Sessions
from reqtable.net.listener import Listener
from reqtable.net.outgoing import Outgoing
from reqtable.net.stream import Stream
from reqtable.table import reaching
from reqtable.table.deadlines import Deadlines
from reqtable.table.input import Input
from reqtable.table.output import Output
from reqtable.table.reaching import Told
from reqtable.table.table import RequestTable
from reqtable.testing import SimulationFailed
from tests.simulation.workloads import run

SEEDS = 500
_PAGE = Path(__file__).parent.parent.parent / "docs" / "explanation" / "tested.md"


@dataclass(frozen=True)
class Mutation:
    """Replaces the text `old`, which occurs once in the function `where` of a class or module, by `new`."""

    name: str
    owner: type | ModuleType
    where: str
    old: str
    new: str

    @contextmanager
    def applied(self) -> Iterator[None]:
        original = vars(self.owner)[self.where]
        source = textwrap.dedent(inspect.getsource(original))
        assert source.count(self.old) == 1, (
            f"{self.name}: {self.old!r} occurs {source.count(self.old)} times in {self.where}, not once"
        )
        namespace: dict[str, Any] = {}
        exec(compile(source.replace(self.old, self.new), self.name, "exec"), original.__globals__, namespace)
        setattr(self.owner, self.where, namespace[self.where])
        try:
            yield
        finally:
            setattr(self.owner, self.where, original)


def likely_seeds(mutation: Mutation) -> list[int]:
    """Return the seeds of which one must find the bug. The one that the page names comes first."""
    named = re.search(rf"^\| {re.escape(mutation.name)} \| (\d+) \|", _PAGE.read_text(), re.MULTILINE)
    seed = int(named[1]) if named is not None else 0
    return [*([seed] if seed < SEEDS else []), *range(SEEDS)]


def first_failure(
    mutation: Mutation, seeds: Iterable[int] = range(SEEDS), simulated: Callable[[int], object] = run
) -> tuple[int, str] | None:
    """Return the first of these seeds that finds the bug, and the problem it reports; None if no seed finds it.

    The seed must find a problem twice. pytest's time limit is raised wherever the test is, even inside a handler, and
    then it looks like a problem of the seed.
    """
    with mutation.applied():
        for seed in seeds:
            if (problem := _problem(simulated, seed)) is not None:
                assert _problem(simulated, seed) is not None, f"seed {seed} has found this only once: {problem}"
                return seed, problem
    return None


def _problem(simulated: Callable[[int], object], seed: int) -> str | None:
    try:
        simulated(seed)
    except SimulationFailed as failure:
        return summary(failure.report.problems[0])
    return None


def summary(problem: str) -> str:
    """Shorten a problem, and leave out details that change with the code."""
    without_place = re.sub(r", in \S+ \(\S+:\d+\)", "", problem.partition("\n")[0])
    return re.sub(r"<Entry \d+ (\w+) [^>]*>", r"a request that is \1", without_place)[:120].replace("|", "")


MUTATIONS = [
    Mutation(
        "a deadline is not armed again after a step",
        *(Steps, "_settle", "if stepped or", "if"),
    ),
    Mutation(
        "bytes that trickle in move the deadline",
        *(Steps, "_settle", "cause is not _INPUT_ARRIVED", "True"),
    ),
    Mutation(
        "an entry is freed in mid-pass",
        *(Endings, "end", "self.closed.append(entry)", "self._release(entry)"),
    ),
    Mutation(
        "a partial send is forgotten",
        *(Stream, "_flush_much", "output.consume(sent)", "output.consume(len(piece))"),
    ),
    Mutation(
        "interest is not restored after WRITING",
        *(Steps, "move", "watch(INTEREST[entry.state])", "watch(entry.transport.watched or INTEREST[entry.state])"),
    ),
    Mutation(
        "a sleeping request is not polled for a reset",
        *(Steps, "move", "watch(INTEREST[entry.state])", "watch(INTEREST[entry.state] & 3)"),
    ),
    Mutation(
        "a reset that is noticed during a wait does not end the request",
        *(Stream, "on_reset", "self.steps.end(self.entry, Event.LOST)", "pass"),
    ),
    Mutation(
        "a READY entry is starved by the one that came last",
        *(Steps, "take_turns", "self.turns.popleft()", "self.turns.pop()"),
    ),
    Mutation(
        "an end of file is taken for a reset",
        *(Stream, "_take_end", "steps.step(entry, _INPUT_ENDED)", "steps.end(entry, Event.LOST)"),
    ),
    Mutation(
        "a connection is closed without lingering",
        *(Stream, "finish", "if self.entry.input.ended:", "if True:"),
    ),
    Mutation(
        "an earlier deadline is not queued",
        *(Deadlines, "arm", "if at < entry.heap_time:", "if entry.heap_time == inf:"),
    ),
    Mutation(
        "a line's end is not looked for where two pieces meet",
        *(Input, "through", "len(data) - len(separator) + 1)", "len(data) + 1)"),
    ),
    Mutation(
        "pieces that are joined change their order",
        *(Output, "front", "[self.first, *others[:count]]", "[*others[:count], self.first]"),
    ),
    Mutation(
        "a send from another's step is not flushed",
        *(Outputs, "flush_touched", "self._flush_touched(entry)", "pass"),
    ),
    Mutation(
        "a full table is never looked at again",
        *(Listener, "listen_again_if_room", "self._full or self.paused_until < inf", "self.paused_until < inf"),
    ),
    Mutation(
        "accepting that fails is tried again at once",
        *(Listener, "_pause_until", "self.watch(0)", "self.paused_until = inf"),
    ),
    Mutation(
        "a burst that stops at the high-water mark is forgotten",
        *(Steps, "_settle", "want.awaits if waits else _AWAITS_TURN", "want.awaits"),
    ),
    Mutation(
        "a session outlives its entry",
        *(Sessions, "discard", "del self.known[key]", "pass"),
    ),
    Mutation(
        "a closed entry stays in the table",
        *(RequestTable, "remove", "del self._entries[entry.id]", "pass"),
    ),
    Mutation(
        "a reset that a flush meets is not noticed",
        *(Steps, "finish", "if self.is_closed(entry):", "if False:"),
    ),
    Mutation(
        "a call goes on though its request has ended",
        *(Endings, "_release", "self._free(entry, request, self.give_up_call, entry)", "None"),
    ),
    Mutation(
        "output that drains is not counted",
        *(Steps, "output_moved", "self.count_buffers(entry)", "pass"),
    ),
    Mutation(
        "output that another one adds to what is blocked is not counted",
        *(Outputs, "_flush_touched", "self.count_buffers(entry)", "pass"),
    ),
    Mutation(
        "input that nobody will read is counted for as long as its connection lingers",
        *(Endings, "linger", "self.table.hold(entry, 0)", "pass"),
    ),
    Mutation(
        "what handle_error raises ends the loop",
        *(Failures, "report", "if self.hooks_raise or ends_program(raised):", "if True:"),
    ),
    Mutation(
        "what a step raises is reported again when its output is flushed",
        *(Steps, "fail", "self.table.running = None", "entry.server.handle_error(None, entry.peer)"),
    ),
    Mutation(
        "a hook that fails at the end of a request is not reported",
        *(
            Endings,
            "_failed",
            "return self.failures.report(entry.server, request, entry.peer, problem, entry.id)",
            "return None",
        ),
    ),
    Mutation(
        "a socket that is reported ready and is not gives a blocking read more time",
        *(CooperativeSocket, "_wait", "timeout_s = until -", "timeout_s = timeout_s or until -"),
    ),
    Mutation(
        "a client that leaves is not noticed while its request waits for an upstream",
        *(Sides, "watch", "own |= PEER_END", "pass"),
    ),
    Mutation(
        "output to an upstream that blocks is forgotten",
        *(Sides, "watch_connection", "(WRITE if row.output.first is not None else 0)", "0"),
    ),
    Mutation(
        "a connection whose output was taken is still polled for room",
        *(Sides, "flush_connections", "self.watch_connection(row)", "pass"),
    ),
    Mutation(
        "a request that was held back is not asked again when the output has been taken",
        *(Waiting, "output_taken", "request.reach.held_back or request.want", "request.want"),
    ),
    Mutation(
        "a request is held back by output that its own step has sent",
        *(Waiting, "settle", "self.sides.flush_connections(reach):", "self.sides.flush_connections(reach) < 0:"),
    ),
    Mutation(
        "the time to take output goes on after the output was taken",
        *(Waiting, "settle", "reach.write_until = None", "pass"),
    ),
    Mutation(
        "a request that is done drops its output to an upstream",
        *(Waiting, "must_finish_later", "if all(row.output.first is None for row in reach.connections):", "if True:"),
    ),
    Mutation(
        "a connection outlives its request",
        *(Endings, "end_reach", "self.let_go(row)", "pass"),
    ),
    Mutation(
        "the connection that loses a race is kept",
        *(BegunConnect, "give_up", "self._steps.let_go(row)", "pass"),
    ),
    Mutation(
        "a connection that is there at once wakes its request in mid-step",
        *(Connector, "connected", "row is not self._begun", "True"),
    ),
    Mutation(
        "an upstream may take for ever to answer",
        *(Connector, "_made", "steps.deadlines.arm(row, table.now + row.timeout)", "pass"),
    ),
    Mutation(
        "a connection is kept for reuse for ever",
        *(Connector, "keep", "self._steps.deadlines.arm(", "(lambda *_: None)("),
    ),
    Mutation(
        "a kept connection that its upstream ends is used again",
        *(Outgoing, "_receive", "steps.end(row, Event.RELEASED)", "row.watch(0)"),
    ),
    Mutation(
        "an address that never answers holds up the other addresses",
        *(Attempts, "_overdue", "self._try_next()", "pass"),
    ),
    Mutation(
        "the slower ones of several attempts to connect are not closed",
        *(Attempts, "close", "attempt.close()", "attempt.watch(0)"),
    ),
    Mutation(
        "input is taken although it has nowhere to go",
        *(reaching, "_take_input", "if reach.is_full_beside(row, ", "if False and (row, "),
    ),
    Mutation(
        "messages are told in the wrong order",
        *(Told, "take", "reach.told.popleft()", "reach.told.pop()"),
    ),
    Mutation(
        "a message to a request that waits for one does not wake it",
        *(ResumableHandler, "tell", "len(reach.told) == 1", "len(reach.told) == 2"),
    ),
]

# Real bugs that the simulation once found, each with a seed that finds it. Only rare orders of events show them.
RARE = [
    (
        1444,
        Mutation(
            "a request whose output blocks keeps its turn",
            *(Outputs, "_block", "self.turns.remove(entry)", "pass"),
        ),
    ),
    (
        1186,
        Mutation(
            "a step that has returned, to a request that can't go on, is waited for, for ever",
            *(RemoteSteps, "_close", "if self._is_out:", "if self._awaits_step:"),
        ),
    ),
]
