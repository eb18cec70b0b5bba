"""The states of a request, and what may follow what: the file to open first.

The rules:

* A state says what a *suspended* request waits for. It is one field, `entry.state`.
* Legality is one table: `TRANSITIONS[state][event]` is the next state; an absent pair is a bug in the engine.
* `entry.advance(event)` is the only place that assigns `entry.state`.
* What the loop polls a request's socket for is derived from it: `INTEREST[state]`. A transport remembers only what it
  last asked the selector for. Three poll for something else: a handshake (OPENING), TLS, a blocking handler's socket.

A request whose bytes arrive, whose step runs and whose answer the kernel takes, all in one pass of the loop, ends the
pass in the state in which it began it: nobody on this one thread could have observed the states in between, so they
are not written down and undone. While its step runs it is `table.running`, and `snapshot()` says RUNNING.
"""

from __future__ import annotations

from enum import Enum

# The same two bits as `selectors.EVENT_READ` and `selectors.EVENT_WRITE` (a test compares them).
READ = 1
WRITE = 2


class State(Enum):
    """What a request waits for. The value is the letter that stands for it in a listing."""

    OPENING = "O"  # a PROXY header, a TLS handshake, or its first step
    READING = "R"  # bytes of the peer
    READY = "Y"  # its turn: it used up its share of this pass
    RUNNING = "X"  # its step to return: the loop is in it now
    WRITING = "W"  # the peer to take output
    SLEEPING = "S"  # a timer
    OFFLOADED = "F"  # the result of a call, or of a step, that runs elsewhere
    DELEGATED = "D"  # the thread or the child that owns the rest of it
    LINGERING = "L"  # the peer's end of file, after our last byte
    CLOSED = "C"  # nothing

    # Members are singletons: identity is the right hash, and it is C instead of Python on every look-up.
    __hash__ = object.__hash__


class Event(Enum):
    """What happened to a request: first what ends a wait, then what a step asks for, then what ends it all."""

    OPENED = "opened"
    INPUT_ARRIVED = "input arrived"
    INPUT_ENDED = "input ended"
    OUTPUT_TAKEN = "output taken"
    OUTPUT_BLOCKED = "output blocked"
    TURN_CAME = "turn came"
    DEADLINE_PASSED = "deadline passed"
    RESULT_POSTED = "result posted"

    AWAITS_INPUT = "awaits input"
    AWAITS_TURN = "awaits its turn"
    AWAITS_TIMER = "awaits a timer"
    AWAITS_RESULT = "awaits a result"
    HANDED_OFF = "handed off"
    FINISHED = "finished"
    RELEASED = "released"

    CANCELLED = "cancelled"
    LOST = "lost"

    __hash__ = object.__hash__


class Ending(Enum):
    """How a request ended. The value is the name by which `stats()` and the access log count it."""

    DONE = "done"  # the handler returned, or the peer ended between two items
    TIMEOUT = "timeout"  # a deadline passed
    LIMIT = "limit"  # more input, output or requests than a limit allows
    RESET = "reset"  # the peer, or the network, broke the connection
    ERROR = "error"  # the handler, a hook or the engine failed
    CANCELLED = "cancelled"  # the program ended the request
    DRAINED = "drained"  # the server was told to end

    __hash__ = object.__hash__


_ENDS = {Event.CANCELLED: State.CLOSED, Event.LOST: State.CLOSED}

TRANSITIONS: dict[State, dict[Event, State]] = {
    State.OPENING: _ENDS
    | {
        Event.OPENED: State.RUNNING,
        Event.DEADLINE_PASSED: State.CLOSED,
        Event.FINISHED: State.LINGERING,  # what came first was not what has to
        Event.RELEASED: State.CLOSED,  # a hook of the server did not want it
    },
    State.READING: _ENDS
    | {
        Event.INPUT_ARRIVED: State.RUNNING,
        Event.INPUT_ENDED: State.RUNNING,
        Event.DEADLINE_PASSED: State.RUNNING,
        Event.OUTPUT_BLOCKED: State.WRITING,  # another request sent to this one
    },
    State.READY: _ENDS | {Event.TURN_CAME: State.RUNNING, Event.OUTPUT_BLOCKED: State.WRITING},
    State.RUNNING: _ENDS
    | {
        Event.AWAITS_INPUT: State.READING,
        Event.AWAITS_TURN: State.READY,
        Event.AWAITS_TIMER: State.SLEEPING,
        Event.AWAITS_RESULT: State.OFFLOADED,
        Event.OUTPUT_BLOCKED: State.WRITING,
        Event.HANDED_OFF: State.DELEGATED,
        Event.FINISHED: State.LINGERING,
        Event.RELEASED: State.CLOSED,  # finished, and nothing to linger for
    },
    State.WRITING: _ENDS | {Event.OUTPUT_TAKEN: State.RUNNING, Event.DEADLINE_PASSED: State.RUNNING},
    State.SLEEPING: _ENDS | {Event.DEADLINE_PASSED: State.RUNNING, Event.OUTPUT_BLOCKED: State.WRITING},
    State.OFFLOADED: _ENDS
    | {
        Event.RESULT_POSTED: State.RUNNING,
        Event.DEADLINE_PASSED: State.RUNNING,
        Event.OUTPUT_BLOCKED: State.WRITING,
    },
    State.DELEGATED: _ENDS | {Event.RESULT_POSTED: State.RUNNING, Event.DEADLINE_PASSED: State.RUNNING},
    State.LINGERING: _ENDS | {Event.INPUT_ENDED: State.CLOSED, Event.DEADLINE_PASSED: State.CLOSED},
    State.CLOSED: {},
}

INTEREST: dict[State, int] = {
    State.OPENING: 0,
    State.READING: READ,
    State.READY: 0,
    State.RUNNING: 0,
    State.WRITING: WRITE,
    State.SLEEPING: 0,
    State.OFFLOADED: 0,
    State.DELEGATED: 0,
    State.LINGERING: READ,
    State.CLOSED: 0,
}
