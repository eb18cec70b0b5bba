"""Deliberate bugs of the code that moves requests to another process. The simulated hand-over must find them."""

from __future__ import annotations

from reqtable.handover.batch import Batch
from reqtable.handover.channel import Channel
from reqtable.handover.giver import Giver
from reqtable.handover.taker import Taker
from reqtable.loop.freezing import Freezer
from reqtable.loop.waiting import Waiting
from reqtable.run import restarting
from reqtable.run.restarting import Restart
from tests.mutations import Mutation

HANDOVER_MUTATIONS = [
    Mutation(
        "requests are committed before the taker has prepared them",
        *(
            Giver,
            "_send",
            "self._ask(messages.Send(",
            "(lambda *sent: (self.channel.send(*sent), self._share()))(messages.Send(",
        ),
    ),
    Mutation(
        "a thawed request is not asked for its want",
        *(
            Freezer,
            "_go_on",
            "    else:\n        steps.step(entry, Event.TURN_CAME)",
            "    else:\n        steps.move(entry, Event.TURN_CAME, entry.want.awaits)",
        ),
    ),
    Mutation(
        "a frozen request is still polled",
        *(Freezer, "freeze", "side.transport.watch(0)", "pass"),
    ),
    Mutation(
        "a frozen request keeps its deadline armed",
        *(Freezer, "freeze", "steps.deadlines.forget(side)", "pass"),
    ),
    Mutation(
        "a move extends the deadline",
        *(Freezer, "thaw", "if deadline < entry.deadline and not has_written:", "if False:"),
    ),
    Mutation(
        "output that another request sends to a frozen one is dropped",
        *(
            Taker,
            "_commit",
            "self._add_late(entry, late[place])",
            "self._add_late(entry, messages.Late(place, [], late[place].told, late[place].cancelled))",
        ),
    ),
    Mutation(
        "what a frozen request is told is dropped",
        *(
            Taker,
            "_commit",
            "self._add_late(entry, late[place])",
            "self._add_late(entry, messages.Late(place, late[place].output, plain.encode([]), late[place].cancelled))",
        ),
    ),
    Mutation(
        "what a frozen request is told comes twice",
        *(
            Taker,
            "_commit",
            "self._add_late(entry, late[place])",
            "[self._add_late(entry, messages.Late(place, [], late[place].told, False)) for _ in range(2)]",
        ),
    ),
    Mutation(
        "a request that is cancelled while it is frozen goes on",
        *(
            Taker,
            "_commit",
            "self._add_late(entry, late[place])",
            "self._add_late(entry, messages.Late(place, late[place].output, late[place].told, False))",
        ),
    ),
    Mutation(
        "a request that the taker has refused is let go",
        *(Batch, "let_go", "self._freezer.thaw(each.entry)", "self._freezer.let_go(each.entry)"),
    ),
    Mutation(
        "on_close is called for a request that has moved",
        *(Freezer, "let_go", "handler, entry.resumable = entry.handler, OVER", "handler = entry.handler"),
    ),
    Mutation(
        "a request that has moved ends its connection in both processes",
        *(
            Freezer,
            "let_go",
            "self._steps.end(entry, Event.MOVED)",
            "(getattr(entry.transport.request, 'shutdown', bool)(2), self._steps.end(entry, Event.MOVED))",
        ),
    ),
    Mutation(
        "new requests have ids that the old process uses",
        *(restarting, "next_range", "(last_id // IDS_PER_PROCESS + 1) * IDS_PER_PROCESS", "0"),
    ),
    Mutation(
        "prepared requests are dropped when the giver has died",
        *(Taker, "ended", "self._commit(messages.Commit([]))", "self._drop_prepared()"),
    ),
    Mutation(
        "prepared requests stay after an Abort",
        *(
            Taker,
            "_act_on",
            "self._drop_prepared()\n        self._end(message.reason)",
            "self._end(message.reason)",
        ),
    ),
    Mutation(
        "prepared requests go on after an Abort",
        *(
            Taker,
            "_act_on",
            "self._drop_prepared()\n        self._end(message.reason)",
            "self._commit(messages.Commit([]))\n        self._end(message.reason)",
        ),
    ),
    Mutation(
        "the listening socket is shut, and not left",
        *(
            Giver,
            "_move_on",
            "self._engine.listeners.unlisten(server)",
            "(self._engine.listeners.unlisten(server), server.socket_type == 1 and server.socket.shutdown(2))",
        ),
    ),
    Mutation(
        "Abort is not sent",
        *(Giver, "fail", "self.channel.send(messages.Abort(problem), then=self.channel.close)", "self.channel.close()"),
    ),
    Mutation(
        "the old process does not listen again after a move has failed",
        *(Giver, "fail", "for server in self._listened:", "for server in ():"),
    ),
    Mutation(
        "too few descriptors count as the death of the giver",
        *(Channel, "_receive", "self._has_problem(str(error))", "(self.close(), self._on_end())"),
    ),
    Mutation(
        "the descriptors of a message that never becomes whole stay open",
        *(Channel, "close", "self._assembler.clear()", "pass"),
    ),
]

# A real bug that few seeds show, with one that finds it.
HANDOVER_RARE = [
    (
        308,
        Mutation(
            "the old process takes the end of the new one, which was told to end, for its death",
            *(Restart, "_exited", "(how is None or self._is_ending)", "False"),
        ),
    ),
    (
        440,
        Mutation(
            "packets that the giver has not read hide its Abort",
            *(
                Channel,
                "_receive",
                "return True  # the other end was closed with unread messages; "
                "what it has sent before that can be read",
                "data = b''",
            ),
        ),
    ),
    (
        440,
        Mutation(
            "a packet that waits has only the numbers of its descriptors",
            *(Channel, "send", "packet.hold(self.poller.dup)", "pass"),
        ),
    ),
    (
        1827,
        Mutation(
            "what happens to a request while its Commit waits is lost",
            *(Giver, "_committed", "if later:", "if False:"),
        ),
    ),
    (
        1924,
        Mutation(
            "a connection of a frozen request is flushed",
            *(Waiting, "touched", "entry.parent.state is State.MOVING", "entry.parent.state is None"),
        ),
    ),
]
