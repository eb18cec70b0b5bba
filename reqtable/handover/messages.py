"""The messages between the process that gives its requests away, and the process that takes them.

In this order:

    taker               giver
    Hello        ->
                 <-     Offer       with the listening sockets
    Ready        ->                 or Refuse: its code can't start
                 <-     Rehearse    records without sockets; several times
    Rehearsed    ->                 if there is a problem, the giver aborts
                 <-     Share       what requests share, to be tried; only if they share something
    Shared       ->                 if there is a problem, the giver aborts
                 <-     Send        records with their sockets; several times for one batch
    Prepared     ->
                 <-     Share       what requests share; only if they do: then there is one batch
    Shared       ->                 if there is a problem, the giver aborts
                 <-     Commit      for each batch: from here on, the requests are the taker's
                 <-     Later       if the kernel had no room for the Commit, and something has happened meanwhile
                 <-     Listen      once nothing is left that could move
    Listening    ->
                 <-     Done        all that stayed with the giver has ended

Until Listen, the giver may send Abort at any time, and goes on with what it has not committed. If the giver dies, the
taker goes on with what is prepared. Every message is MessagePack; none is unpickled.
"""

from __future__ import annotations

from typing import Any

import msgspec

from reqtable.server.shared_state import SharedState

FORMAT = 1


class Message(msgspec.Struct, frozen=True, tag=True):
    """The base of all messages."""


class Hello(Message, frozen=True):
    """The taker has begun to run. `formats` are those of messages that it knows."""

    formats: list[int]
    pid: int


class Offer(Message, frozen=True):
    """The taker begins with these listening sockets: their keys, in the order of their descriptors."""

    format: int
    sockets: list[str]
    first_id: int  # ids of new requests begin above this
    givers: int = 0  # how many workers have the requests; 0: the process itself has them
    restarts: dict[str, int] = {}  # how often the program was restarted, this time included, by the outcome


class Ready(Message, frozen=True):
    """The taker's code has started, and its servers exist. It does not accept yet. `sockets` are the keys that it uses.

    With it comes, for each worker of the offer, one end of a pair: over it, the worker gives its requests away.
    """

    sockets: list[str] = []


class Refuse(Message, frozen=True):
    """The taker can't go on."""

    reason: str


class Rehearse(Message, frozen=True):
    """Records to be tried without their sockets."""

    records: list[bytes]


class Rehearsed(Message, frozen=True):
    """The taker has tried the records. `problems` has one line for each that it can't go on with."""

    problems: list[str]


class Send(Message, frozen=True):
    """Records, with their sockets in the order of the records."""

    records: list[bytes]


class Prepared(Message, frozen=True):
    """The taker holds the requests. `refused` has the places of the others among the records, with the reasons."""

    refused: list[tuple[int, str]]


class Share(Message, frozen=True):
    """The state that requests share. The taker finds out whether it can take the state; in the batch, it takes it."""

    states: list[SharedState]
    only_checks: bool


class Shared(Message, frozen=True):
    """`problem` says why the taker can't take the shared state; None: it can."""

    problem: str | None


class Late(msgspec.Struct, frozen=True):
    """The events of a frozen request after its record was made."""

    place: int  # among the records of the batch
    output: list[bytes]
    told: bytes  # the items, as plain data
    cancelled: bool
    stays: bool = False  # the giver keeps it: what it was sent or told meanwhile is no plain data


class Commit(Message, frozen=True):
    """All prepared requests are the taker's."""

    late: list[Late]


class Later(Message, frozen=True):
    """The events of requests of the last Commit, between the making of the Commit and the moment when it left."""

    late: list[Late]


class Listen(Message, frozen=True):
    """The taker is to accept connections from here on."""


class Listening(Message, frozen=True):
    """The taker accepts connections."""


class Done(Message, frozen=True):
    """The giver has no requests left, and ends."""


class Abort(Message, frozen=True):
    """The taker is to end. The giver goes on."""

    reason: str


# -- between a supervisor and its workers ------------------------------------------------------------------------------


class Give(Message, frozen=True):
    """The worker is to give its requests away, over the pair that comes with this. It then waits for Go.

    `restart` is the number of the restart: an answer that comes too late belongs to one before.
    """

    restart: int


class Go(Message, frozen=True):
    """The worker is to begin the move that it has rehearsed."""


class Progress(Message, frozen=True):
    """How far the move of a worker has come in a restart. The other fields are those of `Outcome`."""

    restart: int
    phase: str
    moved: int
    refused: list[str]
    problem: str
    longest_freeze_s: float
    left: int
    immovable: dict[str, int]


class Take(Message, frozen=True):
    """The worker is to tell the processes that give it their requests that it runs: all its siblings do, too.

    `sockets` are those of `Ready`.
    """

    sockets: list[str]


class Leave(Message, frozen=True):
    """The worker is to accept nothing more, and to end with its last request: the old process goes on."""


ANY = (
    Hello
    | Offer
    | Ready
    | Refuse
    | Rehearse
    | Rehearsed
    | Send
    | Prepared
    | Share
    | Shared
    | Commit
    | Later
    | Listen
    | Listening
    | Done
    | Abort
    | Give
    | Go
    | Progress
    | Take
    | Leave
)
_decoder = msgspec.msgpack.Decoder(ANY)


def encode(message: Message) -> bytes:
    """Return a message as bytes."""
    return msgspec.msgpack.encode(message)


def decode(data: bytes) -> Any:
    """Return the message that `encode` wrote. Raises ValueError for anything else."""
    return _decoder.decode(data)
