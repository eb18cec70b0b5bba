"""Files that move with their request: how one is opened again, by its descriptor, in another process."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from typing import Any

from reqtable.table.errors import NotMovable
from reqtable.table.shapes import shape_of

_KINDS = (io.FileIO, io.BufferedReader, io.BufferedWriter, io.BufferedRandom)


def check_file(file: Any) -> None:
    """Raise NotMovable, with the reason, if a file can't move."""
    kind = type(file)
    if isinstance(file, io.TextIOBase):
        raise NotMovable(f"it has a text file ({kind.__name__}): open it in binary mode")
    if kind not in _KINDS:
        raise NotMovable(f"it has a {kind.__module__}.{kind.__qualname__}, which is no file with a descriptor")
    if file.closed:
        raise NotMovable("it has a file that is closed")
    if kind is io.BufferedReader and not file.seekable():
        raise NotMovable("it reads from a pipe or the like through a buffer: open it with buffering=0")


def save_file(file: Any) -> dict[str, Any]:
    """Return how to open a file again by its descriptor. Flush the output in its buffer to the kernel."""
    file.flush()
    name = file.name if isinstance(file.name, str | bytes) else None
    mode = "rb+" if file.readable() and file.writable() else "rb" if file.readable() else "wb"
    position = file.tell() if file.seekable() else None
    return {"name": name, "mode": mode, "is_raw": type(file) is io.FileIO, "position": position}


def open_file(saved: Mapping[str, Any], descriptor: int) -> Any:
    """Open a file again that `save_file` has described. It owns the descriptor."""
    named = saved["name"] if saved["name"] is not None else descriptor
    file = open(named, saved["mode"], 0 if saved["is_raw"] else -1, opener=lambda *_: descriptor)  # noqa: SIM115
    if saved["position"] is not None:
        file.seek(saved["position"])  # the first process may have read ahead
    return file


def close_files(values: Iterable[Any]) -> None:
    """Close the files among plain data: another process has copies of them."""
    left = list(values)
    while left:
        value = left.pop()
        kind: Any = type(value)
        if kind in _KINDS:
            with contextlib.suppress(OSError):
                value.close()
        elif kind is dict:
            left.extend(value.keys())
            left.extend(value.values())
        elif isinstance(value, list | tuple | set | frozenset):
            left.extend(value)
        elif is_dataclass(value) or hasattr(kind, "__struct_fields__"):
            left.extend(getattr(value, name) for name in shape_of(kind).fields)
