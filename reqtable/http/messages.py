"""A request and its answer, as far as they have come. Both are plain data: fields of a handler."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

from reqtable.http.head import Fields, Head

if TYPE_CHECKING:
    from reqtable.http.forms import Form

_numbers = count(1)
_process = os.urandom(4).hex()  # tells this process from others, and from those before it


def _in_child() -> None:
    global _process
    _process = os.urandom(4).hex()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)

NO_HEAD = Head("-", "/", (1, 1), (), None, False, False, False, None)


@dataclass(slots=True)
class Request:
    """Holds a request, as far as it has come."""

    head: Head = NO_HEAD  # the head; before it has come, a head with the method "-"
    body: bytes = b""  # the whole body, once it has come
    trailers: Fields = ()  # the fields after a chunked body
    pieces: list[bytes] = field(default_factory=list)  # of a body that is still coming
    received: int = 0  # bytes of the body so far
    left: int = 0  # bytes of the body, or of this chunk, that are still to come
    is_whole: bool = True
    is_asked_for: bool = True  # the client sends the body: it need not wait for 100, or it was sent
    is_dropped: bool = False  # the answer has been sent early: the rest of the body is read, and thrown away
    began_at: float = 0.0  # when the head had come, by the table's clock
    known_as: str = ""  # see `id`
    client: str | None = None  # the host of the client, as a trusted proxy has named it
    is_logged: bool = True  # in the access log

    @property
    def method(self) -> str:
        return self.head.method

    @property
    def path(self) -> str:
        """The path, still with its escapes."""
        return self.head.path

    @property
    def query(self) -> str:
        """The text after the first "?" of the target, still with its escapes, or ""."""
        return self.head.query

    @property
    def id(self) -> str:
        """A name for this request in logs, which no other request of any process has: `known_as` if that is set."""
        return self.identify()

    def identify(self) -> str:
        """Return `id`. A method takes half the time of a property."""
        if not self.known_as:
            self.known_as = f"{_process}-{next(_numbers)}"
        return self.known_as

    def get(self, name: str, default: str | None = None) -> str | None:
        """Return the value of a header field, by its name in lower case; several are joined by ", "."""
        return self.head.get(name, default)

    def form(self) -> Form:
        """Return the form in the body: URL-encoded, or multipart, which needs `pip install reqtable[http]`.

        Raises BadRequest if the body is no form.
        """
        from reqtable.http.forms import parse_form  # only here: few requests have one

        return parse_form(self.get("content-type", "") or "", self.body)


@dataclass(slots=True)
class Reply:
    """Holds the state of an answer. A connection has one, which is used again for each request."""

    status: int = 0  # the status; 0: nothing was sent yet
    has_body: bool = True
    is_chunked: bool = False
    left: int | None = None  # bytes of the body that are still to be sent; None: not known beforehand
    sent: int = 0  # bytes of the body so far
    keep_alive: bool = False  # true: the connection stays open after the answer
    is_done: bool = True  # true: nothing more is owed to the client

    def owe(self) -> None:
        """Owe the client an answer, of which nothing was sent yet."""
        self.status = self.sent = 0
        self.is_done = False

    def begin(self, status: int, has_body: bool, is_chunked: bool, left: int | None, keep_alive: bool) -> None:
        """Note what the head of the answer says."""
        self.status = status
        self.has_body = has_body
        self.is_chunked = is_chunked
        self.left = left
        self.sent = 0
        self.keep_alive = keep_alive
        self.is_done = False
