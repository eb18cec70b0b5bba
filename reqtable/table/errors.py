"""Every error that reqtable raises, under one root, split by whose fault it is.

ReqtableError
├── ConfigurationError      the operator's: a bind, a policy, a value that can't be used
├── HandlerError            the handler author's
│   ├── InvalidTransition   a step returned something that is neither a state nor a want
│   └── SendFileError       a file that was being sent ended early, failed, or was closed
└── PeerError               the other end's: one log line, never a traceback
    ├── LimitExceeded       more input, or more untaken output, than was agreed to
    ├── IncompleteRead      the end of file came before what was waited for (an EOFError)
    └── TimedOut            a deadline passed (a TimeoutError)
"""

from __future__ import annotations

from reqtable.table.states import Ending


class ReqtableError(Exception):
    """The root of reqtable's own errors."""


class ConfigurationError(ReqtableError):
    """Something that was asked for can't be served; the message names the thing and the mend."""


class HandlerError(ReqtableError):
    """A handler broke a rule of its own interface."""


class InvalidTransition(HandlerError):
    """A step returned, or awaited, something that is neither a state nor a want."""


class SendFileError(HandlerError):
    """A file that `send_file` sends ended early, failed, or was closed. `__cause__` has the error of the file."""


class PeerError(ReqtableError):
    """The other end did something that ends its request."""


class LimitExceeded(PeerError):
    """A want's `limit`, or a buffer's, would have been exceeded. `limit` is in bytes."""

    def __init__(self, what: str, limit: int) -> None:
        super().__init__(f"{what} exceeds its limit of {limit} bytes")
        self.what = what
        self.limit = limit

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        return type(self), (self.what, self.limit)


class IncompleteRead(PeerError, EOFError):
    """The peer's end of file came before `waited_for`, a want; `partial` is what had arrived and was not yet read."""

    def __init__(self, waited_for: object, partial: bytes) -> None:
        super().__init__(waited_for, partial)
        self.waited_for = waited_for
        self.partial = partial

    def __str__(self) -> str:  # seldom asked for, and every request that ends between two others ends by this
        return f"end of file after {len(self.partial)} bytes while waiting for {shown(self.waited_for)}"


class TimedOut(PeerError, TimeoutError):
    """A deadline passed before what was waited for came."""


def shown(thing: object) -> str:
    """The text of an object that is not ours, such as a want; where it fails to give one, its type."""
    try:
        return str(thing)
    except Exception:
        return f"<{type(thing).__name__}, which fails to describe itself>"


def ending_of(problem: BaseException) -> Ending:
    """How a request ended that ended by `problem`: TIMEOUT, LIMIT, RESET or ERROR.

    A peer that ends between two items, with none begun, is DONE. A group (PEP 654) ends as all of its exceptions do.
    Where they differ, the group is an ERROR if one of them is, and a RESET otherwise.
    """
    if isinstance(problem, BaseExceptionGroup):
        endings = {ending_of(each) for each in problem.exceptions}
        return endings.pop() if len(endings) == 1 else Ending.ERROR if Ending.ERROR in endings else Ending.RESET
    if isinstance(problem, IncompleteRead) and not problem.partial:
        return Ending.DONE
    if isinstance(problem, TimeoutError):
        return Ending.TIMEOUT
    if isinstance(problem, LimitExceeded):
        return Ending.LIMIT
    if isinstance(problem, ConnectionError | IncompleteRead):
        return Ending.RESET
    return Ending.ERROR
