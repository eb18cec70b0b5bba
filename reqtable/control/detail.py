"""Everything about one request: its row, its fields, the head of its input, and the stack of a step that runs."""

from __future__ import annotations

import reprlib
import sys
import threading
import traceback
from itertools import chain, islice
from types import FrameType
from typing import Any

from reqtable.control.query import immovable
from reqtable.control.underway import calls_of, shown_calls, with_queue
from reqtable.server.engine import Engine
from reqtable.table.addresses import printable
from reqtable.table.snapshot import Listing
from reqtable.table.states import State
from reqtable.table.table import Entry

HEAD_BYTES = 512  # of unread input and of unsent output
_DEEP_MAX = 1000  # objects that are measured for the size of the fields: more would hold up the loop
_LARGE_BYTES = 65_536  # of a field: its text may take long to make

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = _SHORT.maxset = 20


def detail_of(engine: Engine, entry: Entry) -> dict[str, Any]:
    """Return everything about one request, as plain data."""
    table = engine.table
    row: Any = Listing().rows((entry,), table.running, table.clock())[0]
    fields = _fields_of(entry)
    thread = thread_of(engine, entry)
    return {
        **with_queue(row, entry),
        "fields": {name: printable(_text_of(value)) for name, value in fields.items()},
        "fields_bytes": deep_size(fields),
        "input_head": bytes(entry.input.peek(HEAD_BYTES)).decode("latin-1") if len(entry.input) else "",
        "timeout_s": entry.timeout,
        "immovable": immovable(entry),
        "attempt": entry.attempt,
        "connections": [each.id for each in table.connections.values() if each.parent_id == entry.id],
        "calls": shown_calls(entry, table.clock()),
        "thread": None if thread is None else _thread_text(thread, _thread_names()),
        "stack": stack_of(engine, entry),
    }


def _fields_of(entry: Entry) -> dict[str, Any]:
    fields = getattr(entry.handler, "fields", None)
    if isinstance(entry.handler, type) or not callable(fields):
        return {}
    found = fields()
    return found if isinstance(found, dict) else {}


def _text_of(value: Any) -> str:
    """Return the short text of a field. A client may have chosen its size."""
    if isinstance(value, str | bytes | bytearray):
        return _SHORT.repr(value[: _SHORT.maxstring + 1])
    size = deep_size(value)
    if size > _LARGE_BYTES:
        return f"<{type(value).__name__} of {size} bytes or more>"
    try:
        return _SHORT.repr(value)
    except Exception:
        return f"<{type(value).__name__}, which fails to describe itself>"


def deep_size(thing: Any) -> int:
    """Return how many bytes plain data takes, with what is in it. Stops after many objects: then it is more."""
    seen: set[int] = set()
    waiting = [thing]
    size = 0
    while waiting and len(seen) < _DEEP_MAX:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        size += sys.getsizeof(each)
        left = _DEEP_MAX - len(seen)
        if isinstance(each, dict):
            waiting += islice(chain.from_iterable(each.items()), left)
        elif isinstance(each, list | tuple | set | frozenset):
            waiting += islice(each, left)
        elif hasattr(each, "__slots__") or hasattr(each, "__dict__"):
            names = [*getattr(each, "__dict__", ()), *getattr(type(each), "__slots__", ())]
            waiting += [getattr(each, name) for name in names if isinstance(name, str) and hasattr(each, name)]
    return size


def stack_of(engine: Engine, entry: Entry) -> list[str]:
    """Return the lines `file:line function` of where a request's code is, the innermost one last.

    It is the stack of the thread that runs the request's code, or its call, or the suspended stack of its handler.
    """
    thread = thread_of(engine, entry)
    frame = None if thread is None else sys._current_frames().get(thread)
    if frame is None:
        find = getattr(entry.resumable, "_frame", None)
        frame = None if find is None else find()
    return [] if frame is None else lines_of(frame)


def thread_of(engine: Engine, entry: Entry) -> int | None:
    """Return the identifier of the thread that runs a request's code, or its call; None: the loop's, or none."""
    of_calls = [each.thread for each in calls_of(entry) if each.thread is not None]
    thread = of_calls[0] if of_calls else pooled_thread_of(engine, entry)
    return getattr(entry.resumable, "thread", None) if thread is None else thread


def pooled_thread_of(engine: Engine, entry: Entry) -> int | None:
    """Return the identifier of the thread that runs a step or a WSGI application. It goes on if the request ends.

    No thread notes which application it runs, because only an operator asks: the stacks of all threads are searched for
    the one that has the handler.
    """
    step = engine.table.elsewhere.get(entry)
    if step is not None:
        return step.thread
    if entry.state is State.RUNNING or isinstance(entry.handler, type):
        return None
    return next((ident for ident, frame in sys._current_frames().items() if _has(frame, entry.handler)), None)


def _has(frame: FrameType | None, handler: Any) -> bool:
    """Return whether one of the functions in a stack has a handler as its `self`."""
    while frame is not None:
        code = frame.f_code
        if ("self" in code.co_varnames or "self" in code.co_freevars) and frame.f_locals.get("self") is handler:
            return True
        frame = frame.f_back
    return False


def lines_of(frame: FrameType) -> list[str]:
    """Return a stack as lines, the innermost one last."""
    return [f"{each.filename}:{each.lineno} {each.name}" for each in traceback.extract_stack(frame)]


def thread_stacks() -> dict[str, list[str]]:
    """Return the stack of every thread of this process, by the name of the thread."""
    names = _thread_names()
    return {_thread_text(ident, names): lines_of(frame) for ident, frame in sys._current_frames().items()}


def _thread_names() -> dict[int | None, str]:
    return {each.ident: each.name for each in threading.enumerate()}


def _thread_text(ident: int, names: dict[int | None, str]) -> str:
    return f"{names.get(ident, '?')} ({ident})"
