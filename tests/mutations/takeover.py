"""Deliberate bugs of the journal and of the takeover after a crash. The simulated crashes must find them."""

from __future__ import annotations

from reqtable.handover import packed, taking_over
from reqtable.handover.journal import Journal
from reqtable.handover.journalled import JournalledStream
from reqtable.handover.taking_over import TakingOver
from tests.mutations import Mutation

TAKEOVER_MUTATIONS = [
    Mutation(
        "the journal is written after the send",
        *(
            JournalledStream,
            "flush",
            "in_page = self.note(output.front() if output.more else output.first)",
            "is_taken = _flush(self)\n"
            "        if entry.state is not _CLOSED:\n"
            "            self.record()\n"
            "        return is_taken",
        ),
    ),
    Mutation(
        "records are committed before they are written",
        *(JournalledStream, "record", "    self.write()", "    self.journal.commit()\n    self.write()\n    return"),
    ),
    Mutation(
        "unread input is not in the page",
        *(
            JournalledStream,
            "on_ready",
            "count = self._receive_into(journal.input)",
            "data = self.request.recv(len(journal.input))\n"
            "        journal = type('Elsewhere', (), {'memory': bytes(INPUT_AT) + data})\n"
            "        count = len(data)",
        ),
    ),
    Mutation(
        "the totals count an end of file as a byte that was received",
        *(taking_over, "totals", " - (state in _PEERS)", ""),
    ),
    Mutation(
        "the totals count an end of file as a byte that was sent",
        *(taking_over, "totals", " - (state in _OURS)", ""),
    ),
    Mutation(
        "the totals count what no process has read",
        *(taking_over, "totals", "arrived - unread", "arrived"),
    ),
    Mutation(
        "output that the kernel has is sent again",
        *(taking_over, "rest_of", "[page.output[sent:]] if sent < len(page.output) else []", "[page.output]"),
    ),
    Mutation(
        "a connection that was reset is continued",
        *(TakingOver, "_totals", "connection.getpeername()", "pass"),
    ),
    Mutation(
        "the totals of a connection that was reset before its request began are negative",
        *(JournalledStream, "enter", "max(0, received - entry.bytes_in)", "received - entry.bytes_in"),
    ),
    Mutation(
        "a request that waits for several things is lost",
        *(packed, "_packed_want", "type(want) is Either", "False"),
    ),
    Mutation(
        "connections that were not begun are closed",
        *(TakingOver, "_begin_rest", "and _is_untouched(connection)", "and False"),
    ),
    Mutation(
        "a crash does not count",
        *(TakingOver, "restore", "progress.attempt += is_cut_off", "pass"),
    ),
    Mutation(
        "the page keeps the number of the row before",
        *(
            Journal,
            "open",
            "    numbers[PHASE] = IDLE  # first: what is half written says nothing\n    numbers[ROW] = row\n",
            "",
        ),
    ),
    Mutation(
        "the output of a page is written after the page says that its steps are done",
        *(Journal, "close", "    numbers = self.numbers\n", "    numbers = self.numbers\n    numbers[PHASE] = DONE\n"),
    ),
]

# Those that few seeds find, each with a seed that finds it.
TAKEOVER_RARE = [
    (
        512,
        Mutation(
            "the page is over before its contents are in a record",
            *(TakingOver, "_note_interrupted", "    for entry", "    self._journal.run(0)\n    for entry"),
        ),
    ),
]
