"""Every error that reqtable raises, under one root, split by whose fault it is.

ReqtableError
├── ConfigurationError      the operator's: a bind, a policy or a value that can't be used
├── HandlerError            the handler author's
│   ├── InvalidTransition   a step returned something that is neither a state nor a want
│   └── SendFileError       a file that was being sent ended early, failed, or was closed
├── NotMovable              a request can't leave the process now: it holds something that is no data
├── ConnectFailed           another service's: a connection to it could not be made (an OSError)
└── PeerError               the peer's: one log line, never a traceback
    ├── LimitExceeded       more input or more unsent output than a limit allows
    ├── IncompleteRead      end of file came before the item that the request waited for (an EOFError)
    └── TimedOut            a deadline passed (a TimeoutError)
"""

from __future__ import annotations

from typing import Any

from reqtable.table.states import Ending


class ReqtableError(Exception):
    """The base class of reqtable's own errors."""


class ConfigurationError(ReqtableError):
    """A setting or an argument can't be used. The message names it and says how to correct it."""


class HandlerError(ReqtableError):
    """A handler broke a rule of its own interface."""


class InvalidTransition(HandlerError):
    """A step returned, or awaited, something that is neither a state nor a want."""


class SendFileError(HandlerError):
    """A file that `send_file` sends ended early, failed, or was closed. `__cause__` is the file's own error, if any."""


class NotMovable(ReqtableError):
    """A request can't become a record now. The message names what it holds that is no data, such as an open file."""

    reason = ""  # the message without the request, where that is known


class ConnectFailed(ReqtableError, OSError):
    """An outgoing connection could not be made. `address` is the one given to `connect`, and `reason` says why.

    `errno` is the system's number, such as ECONNREFUSED; None if the system gave none. If the name could not be looked
    up, `__cause__` is the `socket.gaierror`.
    """

    def __init__(self, address: str, reason: str, errno: int | None = None) -> None:
        super().__init__(f"can't connect to {address}: {reason}")
        self.address = address
        self.reason = reason
        self.errno = errno

    def __reduce__(self) -> tuple[type, tuple[str, str, int | None]]:
        return type(self), (self.address, self.reason, self.errno)


class PeerError(ReqtableError):
    """The peer did something that ends its request, unless the handler catches this.

    `connection` is the outgoing connection that the error is about; None: the client's own.
    """

    connection: Any = None


class LimitExceeded(PeerError):
    """The limit of a want or of a buffer was exceeded. `limit` is in bytes."""

    def __init__(self, what: str, limit: int) -> None:
        super().__init__(f"{what} exceeds its limit of {limit} bytes")
        self.what = what
        self.limit = limit

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        return type(self), (self.what, self.limit)


class IncompleteRead(PeerError, EOFError):
    """The peer's end of file came before the item of the want `waited_for`. `partial` is the input left unread."""

    def __init__(self, waited_for: object, partial: bytes) -> None:
        super().__init__(waited_for, partial)
        self.waited_for = waited_for
        self.partial = partial

    def __str__(self) -> str:  # made on demand: it is seldom shown, and a peer that ends between two items raises it
        return f"end of file after {len(self.partial)} bytes while waiting for {shown(self.waited_for)}"


class TimedOut(PeerError, TimeoutError):
    """A deadline passed before the item that the request waited for arrived."""


def shown(thing: object) -> str:
    """Return the text of a foreign object, such as a want. If that fails, name its type."""
    try:
        return str(thing)
    except Exception:
        return f"<{type(thing).__name__}, which fails to describe itself>"


def ending_of(problem: BaseException) -> Ending:
    """Return how a request ended that `problem` ended: DONE, TIMEOUT, LIMIT, RESET, UPSTREAM or ERROR.

    DONE means that the peer ended between two items. A group (PEP 654) ends as all of its exceptions do. If these
    differ, the group is ERROR if one of them is, and RESET otherwise.
    """
    if isinstance(problem, BaseExceptionGroup):
        endings = {ending_of(each) for each in problem.exceptions}
        return endings.pop() if len(endings) == 1 else Ending.ERROR if Ending.ERROR in endings else Ending.RESET
    if isinstance(problem, ConnectFailed) or getattr(problem, "connection", None) is not None:
        return Ending.UPSTREAM
    if isinstance(problem, IncompleteRead) and not problem.partial:
        return Ending.DONE
    if isinstance(problem, TimeoutError):
        return Ending.TIMEOUT
    if isinstance(problem, LimitExceeded):
        return Ending.LIMIT
    if isinstance(problem, ConnectionError | IncompleteRead):
        return Ending.RESET
    return Ending.ERROR
