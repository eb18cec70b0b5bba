"""Finds fields whose values can't be data, so that a request that has one can't move to another process."""

from __future__ import annotations

import collections.abc as abstract
import inspect
import io
import threading
import types
import typing
from enum import Enum
from typing import Any

from reqtable.handlers.source import is_ours
from reqtable.table.plain import refusal_of
from reqtable.table.shapes import shape_of

_PLAIN = {type(None), bool, int, float, str, bytes, bytearray, list, tuple, dict, set, frozenset, object}
# Binary files and connections move beside the record.
_MOVED = (io.FileIO, io.BufferedReader, io.BufferedWriter, io.BufferedRandom)
_NEVER: tuple[Any, ...] = (
    abstract.Callable,
    abstract.Iterator,
    abstract.Awaitable,
    abstract.AsyncIterator,
    typing.TextIO,
)
_LOCKS = (threading.Lock, threading.RLock)  # until Python 3.13, these are functions
_ABSTRACT = {"typing", "collections.abc", "abc"}


def why_no_data(cls: type, owner: type, name: str) -> tuple[str, str] | None:
    """Return why a field of `cls` can't be data, by its default or by its annotation in `owner`, and the mend.

    None if the field can be data.
    """
    default = inspect.getattr_static(cls, name, None)
    if not isinstance(default, types.MemberDescriptorType) and (refused := refusal_of(default)):
        return refused, "annotate it as ClassVar to share it, or set it when the request begins"
    mend = "keep data from which it is made again, or annotate the field as Any if requests need not move"
    return None if (refused := _refused(_hint_of(owner, name))) is None else (refused, mend)


def _hint_of(owner: type, name: str) -> Any:
    """Return the annotation of a field; Any if it can't be evaluated now."""
    hint = inspect.get_annotations(owner)[name]
    if isinstance(hint, str):
        try:
            return eval(hint, vars(inspect.getmodule(owner)), dict(vars(owner)))
        except Exception:  # a name that only the type checker imports
            return Any
    return hint


def _refused(hint: Any) -> str | None:
    """Return why a value of that type is no plain data; None if it may be, or if nothing is known of the type."""
    kind = typing.get_origin(hint) or hint
    if any(kind is each for each in _LOCKS):
        return f"a threading.{kind.__name__.rpartition('_')[2]} is no plain data"
    if kind is typing.Annotated or kind is typing.Final or kind in (typing.Union, types.UnionType):
        return next((found for each in _parts(hint) if (found := _refused(each))), None)
    if not isinstance(kind, type) or is_ours(kind.__module__):
        return None
    if kind in _NEVER or (inspect.isabstract(kind) and issubclass(kind, _NEVER) and kind not in _MOVED):
        return f"a {kind.__name__} is no plain data"
    if kind in _PLAIN:
        return next((found for each in _parts(hint) if (found := _refused(each))), None)
    return None if _is_open(kind) else shape_of(kind).refusal or None


def _is_open(kind: type) -> bool:
    """Return whether values of that type are of other classes, or are data that `shape_of` does not know."""
    if kind.__module__ in _ABSTRACT or inspect.isabstract(kind) or getattr(kind, "_is_protocol", False):
        return True
    return typing.is_typeddict(kind) or issubclass(kind, (Enum, *_MOVED))


def _parts(hint: Any) -> list[Any]:
    return [each for each in typing.get_args(hint) if each is not ...]
