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

    OPENING = "O"  # a PROXY header, a TLS handshake, or its first step
    CONNECTING = "N"  # an outgoing connection: its peer to accept it
    READING = "R"  # bytes from the peer
    WAITING = "T"  # one of several things: messages, timers, calls, bytes from its peer or from another connection
    READY = "Y"  # its turn: it has used up its share of this pass
    RUNNING = "X"  # the end of its step, which the loop is running
    WRITING = "W"  # the peer to take output
    SLEEPING = "S"  # a timer
    OFFLOADED = "F"  # the result of a call, or of a step, that runs elsewhere
    DELEGATED = "D"  # the thread or the child that owns the rest of the request
    LINGERING = "L"  # the peer's end of file, after our last byte
    MOVING = "M"  # another process to take it over, or this one to go on with it
    CLOSED = "C"  # nothing: the request has ended

    # Members are singletons, so identity is the right hash. It runs in C; the Enum's own hash runs in Python.
    __hash__ = object.__hash__


class Event(Enum):
    """Says what happened to a request.

    The first group ends a wait. The second group is what a step asks for. The third group moves the request to another
    process. The fourth group ends the request.
    """

    OPENED = "opened"
    CONNECTED = "connected"
    INPUT_ARRIVED = "input arrived"
    INPUT_ENDED = "input ended"
    OUTPUT_TAKEN = "output taken"
    OUTPUT_BLOCKED = "output blocked"
    TURN_CAME = "turn came"
    DEADLINE_PASSED = "deadline passed"
    RESULT_POSTED = "result posted"

    AWAITS_INPUT = "awaits input"
    AWAITS_ANY = "awaits any of several"
    AWAITS_TURN = "awaits its turn"
    AWAITS_TIMER = "awaits a timer"
    AWAITS_RESULT = "awaits a result"
    HANDED_OFF = "handed off"
    FINISHED = "finished"
    RELEASED = "released"

    FROZEN = "frozen"
    THAWED = "thawed"
    MOVED = "moved"

    CANCELLED = "cancelled"
    LOST = "lost"

    __hash__ = object.__hash__


class Ending(Enum):
    """How a request ended. The value is the name by which `stats()` and the access log count it."""

    DONE = "done"  # the handler returned, or the peer ended between two items
    TIMEOUT = "timeout"  # a deadline passed
    LIMIT = "limit"  # more input, output or requests than a limit allows
    RESET = "reset"  # the peer, or the network, broke the connection
    UPSTREAM = "upstream"  # another connection of the request could not be made, or broke
    ERROR = "error"  # the handler, a hook or the engine failed
    CANCELLED = "cancelled"  # the program ended the request
    DRAINED = "drained"  # the server was told to end before the request was done
    MOVED = "moved"  # another process goes on with the request

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
