"""The states of a request, and which state may follow which. Read this file first.

The rules:

* A state says what a *suspended* request waits for. It is one field, `entry.state`.
* `TRANSITIONS[state][event]` is the next state. If the pair is absent, the engine has a bug.
* `entry.advance(event)` is the only place that assigns `entry.state`.
* `INTEREST[state]` says what the loop polls the request's socket for. A transport remembers only what it last asked the
  selector for. Three transports poll for something else: during OPENING, under TLS, and for a blocking handler.

Often a request's bytes arrive, its step runs, and the kernel takes its answer, all in one pass of the loop. Such a
request ends the pass in the state in which it began the pass. The loop skips the states in between, because nothing
else on its thread could observe them. While a step runs, its entry is `table.running`, and `snapshot()` shows RUNNING.
"""

from __future__ import annotations

from enum import Enum

# The same two bits as `selectors.EVENT_READ` and `selectors.EVENT_WRITE` (a test compares them).
READ = 1
WRITE = 2
# Only our own selectors know these two bits.
RESET = 4  # the peer has reset the connection. The kernel reports a reset with any interest, so alone: nothing else
PEER_END = 8  # the peer has ended its output, even if some of it is still unread (EPOLLRDHUP in epoll_ctl(2))


class State(Enum):
    """Says what a request waits for. The value is the letter that a listing shows."""

    OPENING = "O"
    """The request waits for a PROXY header, for a TLS handshake, or for its first step."""

    CONNECTING = "N"
    """An outgoing connection waits for its peer to accept it."""

    READING = "R"
    """The request waits for bytes from its client."""

    WAITING = "T"
    """The request waits for one of several things: a message, a timer, a call, its client, another connection."""

    READY = "Y"
    """The request waits for its turn, because it has used up its share of this pass."""

    RUNNING = "X"
    """The loop is running a step of the request."""

    WRITING = "W"
    """The request waits for its client to take output."""

    SLEEPING = "S"
    """The request waits for a timer."""

    OFFLOADED = "F"
    """The request waits for the result of a call, or of a step, that runs elsewhere."""

    DELEGATED = "D"
    """The request waits for the thread or the child that runs the rest of it."""

    LINGERING = "L"
    """The request waits for its client's end of file, after our last byte."""

    MOVING = "M"
    """The request waits for another process to take it over, or for this process to go on with it."""

    CLOSED = "C"
    """The request has ended."""

    # Members are singletons, so identity is the right hash. It runs in C; the Enum's own hash runs in Python.
    __hash__ = object.__hash__


class Event(Enum):
    """Says what happened to a request.

    The first group ends a wait. The second group is what a step asks for. The third group moves the request to another
    process. The fourth group ends the request.
    """

    OPENED = "opened"
    """The header and the handshake are done, and the request begins."""

    CONNECTED = "connected"
    """An outgoing connection has been made."""

    INPUT_ARRIVED = "input arrived"
    """The item that the request waits for has arrived."""

    INPUT_ENDED = "input ended"
    """The peer has ended its output."""

    OUTPUT_TAKEN = "output taken"
    """The peer has taken enough output."""

    OUTPUT_BLOCKED = "output blocked"
    """The kernel takes no more output for now."""

    TURN_CAME = "turn came"
    """The turn of a READY request has come."""

    DEADLINE_PASSED = "deadline passed"
    """The deadline of the wait has passed."""

    RESULT_POSTED = "result posted"
    """A thread, a child or an executor has given its result."""

    AWAITS_INPUT = "awaits input"
    """The step waits for input."""

    AWAITS_ANY = "awaits any of several"
    """The step waits for the first of several things."""

    AWAITS_TURN = "awaits its turn"
    """The request has used up its share of this pass."""

    AWAITS_TIMER = "awaits a timer"
    """The step waits for a time."""

    AWAITS_RESULT = "awaits a result"
    """The step waits for a result from elsewhere."""

    HANDED_OFF = "handed off"
    """The step gives the rest of the request to a thread or a child."""

    FINISHED = "finished"
    """The request is done, and waits for its client's end of file."""

    RELEASED = "released"
    """The request is done, and need not linger."""

    FROZEN = "frozen"
    """The request stands still, so that it can move to another process."""

    THAWED = "thawed"
    """The request goes on in this process."""

    MOVED = "moved"
    """The request goes on in another process."""

    CANCELLED = "cancelled"
    """The program, or an operator, has ended the request."""

    LOST = "lost"
    """The connection has broken."""

    __hash__ = object.__hash__


class Ending(Enum):
    """How a request ended. The value is the name by which `stats()` and the access log count it."""

    DONE = "done"
    """The handler returned, or the peer ended between two items."""

    TIMEOUT = "timeout"
    """A deadline passed."""

    LIMIT = "limit"
    """More input, output or requests than a limit allows."""

    RESET = "reset"
    """The peer, or the network, broke the connection."""

    UPSTREAM = "upstream"
    """Another connection of the request could not be made, or broke."""

    ERROR = "error"
    """The handler, a hook or the engine failed."""

    CANCELLED = "cancelled"
    """The program ended the request."""

    DRAINED = "drained"
    """The server was told to end before the request was done."""

    MOVED = "moved"
    """Another process goes on with the request."""

    __hash__ = object.__hash__


_ENDS = {Event.CANCELLED: State.CLOSED, Event.LOST: State.CLOSED}
_MAY_MOVE = {Event.FROZEN: State.MOVING}

TRANSITIONS: dict[State, dict[Event, State]] = {
    State.OPENING: _ENDS
    | {
        Event.FROZEN: State.MOVING,  # it comes from another process
        Event.OPENED: State.RUNNING,
        Event.DEADLINE_PASSED: State.CLOSED,
        Event.FINISHED: State.LINGERING,  # its PROXY header or TLS handshake failed
        Event.RELEASED: State.CLOSED,  # a hook of the server refused it, or took it elsewhere
    },
    State.CONNECTING: _ENDS | {Event.CONNECTED: State.WAITING, Event.RELEASED: State.CLOSED},
    State.READING: _ENDS
    | _MAY_MOVE
    | {
        Event.INPUT_ARRIVED: State.RUNNING,
        Event.INPUT_ENDED: State.RUNNING,
        Event.DEADLINE_PASSED: State.RUNNING,
        Event.OUTPUT_BLOCKED: State.WRITING,  # another request sent to this one
    },
    State.WAITING: _ENDS
    | _MAY_MOVE
    | {
        Event.INPUT_ARRIVED: State.RUNNING,
        Event.INPUT_ENDED: State.RUNNING,
        Event.OUTPUT_TAKEN: State.RUNNING,
        Event.RESULT_POSTED: State.RUNNING,
        Event.DEADLINE_PASSED: State.RUNNING,
        Event.RELEASED: State.CLOSED,  # an outgoing connection that its request has closed
    },
    State.READY: _ENDS | _MAY_MOVE | {Event.TURN_CAME: State.RUNNING, Event.OUTPUT_BLOCKED: State.WRITING},
    State.RUNNING: _ENDS
    | {
        Event.AWAITS_INPUT: State.READING,
        Event.AWAITS_ANY: State.WAITING,
        Event.AWAITS_TURN: State.READY,
        Event.AWAITS_TIMER: State.SLEEPING,
        Event.AWAITS_RESULT: State.OFFLOADED,
        Event.OUTPUT_BLOCKED: State.WRITING,
        Event.HANDED_OFF: State.DELEGATED,
        Event.FINISHED: State.LINGERING,
        Event.RELEASED: State.CLOSED,  # finished, with no need to linger
    },
    State.WRITING: _ENDS | _MAY_MOVE | {Event.OUTPUT_TAKEN: State.RUNNING, Event.DEADLINE_PASSED: State.RUNNING},
    State.SLEEPING: _ENDS | _MAY_MOVE | {Event.DEADLINE_PASSED: State.RUNNING, Event.OUTPUT_BLOCKED: State.WRITING},
    State.OFFLOADED: _ENDS
    | {
        Event.RESULT_POSTED: State.RUNNING,
        Event.DEADLINE_PASSED: State.RUNNING,
        Event.OUTPUT_BLOCKED: State.WRITING,
    },
    State.DELEGATED: _ENDS | {Event.RESULT_POSTED: State.RUNNING, Event.DEADLINE_PASSED: State.RUNNING},
    State.LINGERING: _ENDS | {Event.INPUT_ENDED: State.CLOSED, Event.DEADLINE_PASSED: State.CLOSED},
    State.MOVING: _ENDS | {Event.THAWED: State.READY, Event.MOVED: State.CLOSED},
    State.CLOSED: {},
}
"""The next state, by the state and the event: `TRANSITIONS[State.READING][Event.INPUT_ARRIVED]`."""

INTEREST: dict[State, int] = {
    State.OPENING: 0,
    State.CONNECTING: 0,  # each attempt to connect polls its own socket
    State.READING: READ,
    State.WAITING: RESET,  # and what its wants need: see loop/waiting.py
    State.READY: 0,
    State.RUNNING: 0,
    State.WRITING: WRITE,
    State.SLEEPING: RESET,
    State.OFFLOADED: RESET,
    State.DELEGATED: RESET,
    State.LINGERING: READ,
    State.MOVING: 0,
    State.CLOSED: 0,
}
"""What the loop polls the request's socket for, by the state: `READ`, `WRITE`, `RESET` or nothing."""
