"""Finds methods whose names are almost those of hooks: nothing calls them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from reqtable.handlers.declaration import is_state
from reqtable.handlers.finding import Finding
from reqtable.handlers.reached import words_of
from reqtable.handlers.source import is_ours
from reqtable.table.places import place_of

_HOOKS = {"start", "migrate"}  # and those that begin with on_
_OPTIONAL = {"save_state", "restore_state"}  # no base has these
_SIMILARITY_MIN = 0.84


def misspelt_hooks(cls: Any) -> Iterator[Finding]:
    """Yield a finding for each method that nothing uses, and whose name is nearly that of a hook."""
    own = {name: value for base in cls.__mro__ if not is_ours(base.__module__) for name, value in vars(base).items()}
    ours = {name for base in cls.__mro__ if is_ours(base.__module__) for name in vars(base)}
    hooks = {name for name in ours if name in _HOOKS or name.startswith("on_")} | _OPTIONAL
    used = words_of(cls)
    if used is None:
        return
    for name, value in own.items():
        if name in ours | _OPTIONAL | used or is_state(value) or not isinstance(value, FunctionType | classmethod):
            continue
        near = difflib.get_close_matches(name, sorted(hooks - own.keys()), n=1, cutoff=_SIMILARITY_MIN)
        if near:
            text = f"{cls.__name__}.{name} is never called"
            yield Finding("hook", place_of(value), text, f"did you mean {near[0]}?", False)
