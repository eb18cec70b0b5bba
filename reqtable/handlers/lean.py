"""Puts the C form of the lean path in the place of the Python form, where the C module is there.

`REQTABLE_PURE=1` in the environment turns the C module off.
"""

from __future__ import annotations

import importlib
import os
import socket
from types import ModuleType

from reqtable.handlers.declaration import Declaration
from reqtable.handlers.resumable import ResumableHandler
from reqtable.handlers.state import StateRequestHandler
from reqtable.loop.step import Steps
from reqtable.net.stream import Stream
from reqtable.table.input import MISSING, Input
from reqtable.table.limits import Limits
from reqtable.table.output import SMALL_BYTES, Output
from reqtable.table.states import Event, State
from reqtable.table.table import Entry, RequestTable
from reqtable.table.wants import Line


def _find() -> ModuleType | None:
    if os.environ.get("REQTABLE_PURE", "0") not in ("", "0"):
        return None
    try:
        return importlib.import_module("reqtable._lean")
    except ImportError:
        return None


lean: ModuleType | None = _find()
"""The C module, or None: then all of the package is Python."""


def install() -> None:
    """Replace four methods, if the C module is there."""
    if lean is None:
        return
    made = lean.install(
        {each.__name__: each for each in (Declaration, Entry, Input, Limits, Line, Output, RequestTable, Steps, Stream)}
        | {each.__name__: each for each in (ResumableHandler, StateRequestHandler)}
        | {"Socket": socket.socket, "SMALL_BYTES": SMALL_BYTES}
        | {"MISSING": MISSING, "READING": State.READING, "AWAITS_INPUT": Event.AWAITS_INPUT}
        | {"on_ready": Stream.on_ready, "take_in": Steps.take_in, "_resume": StateRequestHandler._resume}
        | {"_send": ResumableHandler._send}
    )
    owners = {"on_ready": Stream, "take_in": Steps, "_resume": StateRequestHandler, "_send": ResumableHandler}
    for name, method in made.items():
        setattr(owners[name], name, method)
    StateRequestHandler.send = ResumableHandler._send
