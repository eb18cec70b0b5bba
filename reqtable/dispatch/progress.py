"""The progress of a request that a thread or a child has, for the row of the request.

The loop asks it only when a deadline has passed, or when the request is cancelled.
"""

from __future__ import annotations

import mmap
import struct
from math import isnan, nan
from typing import Any

_LAYOUT = struct.Struct("d??")  # when it began, whether it is partial, whether it has connections
_BEGAN_AT = struct.Struct("d")
_PARTIAL_AT, _CONNECTIONS_AT = 8, 9


class Progress:
    """Tells the loop how far a thread has come with its request."""

    def __init__(self, began_at: float | None) -> None:
        self.began_at = began_at  # as `Entry.began_at`
        self.is_partial = False  # the client has part of an answer
        self.has_connections = False  # the request has other connections than its client's


class SharedProgress:
    """Tells the same of a child, in a page of memory that the child shares with its parent."""

    def __init__(self, began_at: float | None) -> None:
        self._page = mmap.mmap(-1, _LAYOUT.size)
        self.began_at = began_at

    @property
    def began_at(self) -> float | None:
        (at,) = _BEGAN_AT.unpack_from(self._page)
        return None if isnan(at) else at

    @began_at.setter
    def began_at(self, at: float | None) -> None:
        _BEGAN_AT.pack_into(self._page, 0, nan if at is None else at)

    @property
    def is_partial(self) -> bool:
        return bool(self._page[_PARTIAL_AT])

    @is_partial.setter
    def is_partial(self, value: bool) -> None:
        self._page[_PARTIAL_AT] = value

    @property
    def has_connections(self) -> bool:
        return bool(self._page[_CONNECTIONS_AT])

    @has_connections.setter
    def has_connections(self, value: bool) -> None:
        self._page[_CONNECTIONS_AT] = value


AnyProgress = Progress | SharedProgress


def progress_of(
    handler: Any, kind: type[Progress] | type[SharedProgress], began_at: float | None
) -> AnyProgress | None:
    """Make the progress of a handler's request; None if the handler never has last words, so that nobody asks."""
    return kind(began_at) if getattr(handler, "_owes_answers", False) else None
