"""`StallPage`: what a worker that is stuck can still say: which request holds up its loop.

The thread that watches for stalls runs while the loop does not. It writes into memory that the supervisor shares.
"""

from __future__ import annotations

import mmap
import struct
from typing import Any

import msgspec

from reqtable.table.addresses import address_text
from reqtable.table.snapshot import handler_name
from reqtable.table.table import Entry

_LENGTH = struct.Struct("=I")


class StallPage:
    """A page of memory that a supervisor makes before it forks a worker."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)

    def note(self, entry: Entry | None) -> None:
        """In the worker: say whose step holds up the loop. None: no step does any more."""
        _LENGTH.pack_into(self._memory, 0, 0)  # nothing counts while the rest is written
        if entry is not None:
            found = {"id": entry.id, "peer": address_text(entry.peer), "handler": handler_name(entry.handler)}
            data = msgspec.json.encode(found)[: mmap.PAGESIZE - _LENGTH.size]
            self._memory[_LENGTH.size : _LENGTH.size + len(data)] = data
            _LENGTH.pack_into(self._memory, 0, len(data))

    def request(self) -> dict[str, Any] | None:
        """In the supervisor: return the id, the peer and the handler of that request; None: none is known."""
        [length] = _LENGTH.unpack_from(self._memory)
        try:
            return msgspec.json.decode(self._memory[_LENGTH.size : _LENGTH.size + length])  # type: ignore[no-any-return]
        except msgspec.DecodeError:  # nothing was written, or it is being written
            return None

    def close(self) -> None:
        self._memory.close()
