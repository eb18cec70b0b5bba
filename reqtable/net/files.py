"""The size of a file that is to be sent."""

from __future__ import annotations

import os
from stat import S_ISREG
from typing import Any


def size_of(file: Any) -> int:
    """Return the size of a file in bytes. Raises ValueError if that can't be told."""
    try:
        status = os.fstat(file.fileno())
    except (AttributeError, OSError):
        return int(file.seek(0, os.SEEK_END))
    if not S_ISREG(status.st_mode) or (not status.st_size and os.pread(file.fileno(), 1, 0)):
        raise ValueError(f"send_file() can't tell the size of {file!r}: give a count, or send(file.read())")
    return status.st_size
