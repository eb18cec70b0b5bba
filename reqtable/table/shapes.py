"""The shapes of classes: which fields the objects of a class have, and how such an object is made without its code."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from reqtable.table.errors import NotMovable

_UNSET = object()
_MEND = "raise state_version, and write migrate()"


class Shape(NamedTuple):
    """Describes the objects of one class: their `fields`, and which of these have a default."""

    name: str
    fields: tuple[str, ...]
    optional: Collection[str]  # the fields that have a default
    make: Callable[[dict[str, Any]], Any]  # an object with these values; the other fields have their defaults
    refusal: str  # why objects of this class are no plain data; "" if they are

    def check(self, value: Any) -> None:
        """Raise NotMovable if an object has more, or less, than its fields: a copy of the fields would not be it."""
        for name in self.fields:
            if getattr(value, name, _UNSET) is _UNSET:
                raise NotMovable(f"a {self.name} has no value for its field {name!r}")
        more = [each for each in getattr(value, "__dict__", ()) if each not in self.fields and each[:2] != "__"]
        if more:
            raise NotMovable(f"a {self.name} has the attribute {more[0]!r}, which is no field")

    def misfit(self, values: Mapping[str, Any]) -> str | None:
        """Return why there can't be an object with these values; None if there can."""
        for name in values:
            if name not in self.fields:
                return f"{self.name} has no field {name!r}, but the record has: {_MEND}"
        for name in self.fields:
            if name not in values and name not in self.optional:
                return f"{self.name} has the field {name!r} without a default, but the record has none: {_MEND}"
        return None


@lru_cache(maxsize=1024)
def shape_of(kind: Any) -> Shape:
    """Return the shape of a class."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    if hasattr(kind, "__struct_fields__"):  # a msgspec.Struct
        refusal = f"a {name} has a __post_init__, which a copy must not run" if hasattr(kind, "__post_init__") else ""
        return Shape(name, kind.__struct_fields__, _optional_in_struct(kind), lambda values: kind(**values), refusal)
    if is_dataclass(kind):
        return _of_dataclass(kind, name)
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return _of_named_tuple(kind, name)
    return Shape(name, (), (), dict, f"a {name} is no plain data")


def _of_dataclass(kind: Any, name: str) -> Shape:
    names = tuple(each.name for each in fields(kind))
    defaults = _dataclass_defaults(kind)

    def make(values: dict[str, Any]) -> Any:
        made = object.__new__(kind)
        for each in names:
            object.__setattr__(made, each, values[each] if each in values else defaults[each]())
        return made

    try:
        object.__new__(kind)
        refusal = ""
    except TypeError:  # it is abstract, or derived from a class such as dict, which has more than the fields
        refusal = f"a {name} has more than its fields"
    return Shape(name, names, defaults, make, refusal)


def _of_named_tuple(kind: Any, name: str) -> Shape:
    names = kind._fields
    given = kind._field_defaults

    def make(values: dict[str, Any]) -> Any:
        return tuple.__new__(kind, [values[each] if each in values else given[each] for each in names])

    return Shape(name, names, given, make, "")


def _dataclass_defaults(kind: Any) -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {}
    for each in fields(kind):
        if each.default_factory is not MISSING:
            found[each.name] = each.default_factory
        elif each.default is not MISSING:
            found[each.name] = lambda value=each.default: value  # type: ignore[misc]
    return found


def _optional_in_struct(kind: Any) -> set[str]:
    """Return the names of the fields that have a default in a Struct. The constructor of the Struct sets defaults."""
    import msgspec  # there is a Struct, so the package is there

    nothing = msgspec.NODEFAULT
    found = msgspec.structs.fields(kind)
    return {each.name for each in found if each.default is not nothing or each.default_factory is not nothing}
