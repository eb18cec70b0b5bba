"""Plain data as bytes, for records of requests. Nothing is unpickled: reading bytes makes data, and runs no code.

Plain data is None, bool, int, float, str, bytes, bytearray, list, tuple, dict, set and frozenset, and also the members
of an Enum, named tuples, dataclasses and `msgspec.Struct` objects whose fields are plain data.

MessagePack has no tuples, sets or objects. So each of these is written as a map with the key `!`, which names its kind.
An object is written as the name of its class and its fields. The reader finds the class among the modules that the
process has imported, makes the object without calling its constructor, and sets the fields.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from enum import Enum
from functools import lru_cache
from typing import Any

from reqtable.table.errors import NotMovable, ReqtableError
from reqtable.table.shapes import Shape, shape_of

_SCALARS = {type(None), bool, float, bytes}
_AS_THEY_ARE = _SCALARS | {int, str}
_KIND = "!"
_INT_BITS = 63  # of the integers of MessagePack that every reader has
DEPTH_MAX = 64  # of values within values
_LEVELS_MAX = 3 * (DEPTH_MAX + 2)  # of MessagePack: a dict whose keys are no words takes three for each of its own

# Returns plain data that stands for a value which is bound to this process; None for any other value. See `encode`.
Attach = Callable[[Any], "tuple[str, Any] | None"]


def no_attachment(value: Any) -> None:
    """Attach nothing."""


def encode(value: Any, attach: Attach = no_attachment) -> bytes:
    """Return `value` as bytes. Raises NotMovable, with the reason, if it is no plain data.

    `attach(value)` is asked about each value that is no plain data. It returns the pair of a kind and of plain data
    that stands for the value, or None.
    """
    encoder = _encoder()
    try:
        return encoder(_Writer(attach, _AS_THEY_ARE).written(value, 0))  # type: ignore[no-any-return]
    except (OverflowError, UnicodeEncodeError):  # a number is too large for MessagePack, or a text is no UTF-8
        return encoder(_Writer(attach, _SCALARS).written(value, 0))  # type: ignore[no-any-return]


def decode(data: bytes, attached: Mapping[str, Callable[[Any], Any]] | None = None, lenient: bool = False) -> Any:
    """Return the value that `encode` wrote. Raises ReqtableError if it can't be read.

    `attached` has, for each kind of `attach`, the function that returns the value. With `lenient`, an object that its
    class does not fit any more is a dict of its fields, and a member that its Enum does not have is its name.
    """
    return _read(data, _Reader(attached or {}, lenient))


def describe(data: bytes, attached: Mapping[str, Callable[[Any], Any]] | None = None) -> Any:
    """Return the value that `encode` wrote, with a `Described` for each object: no class is looked for.

    Raises ReqtableError if it can't be read.
    """
    return _read(data, _Describer(attached or {}, lenient=True))


class Described:
    """Stands for an object that is not made: the name of its class, and its fields. A member has no fields."""

    def __init__(self, name: str, values: Mapping[str, Any] | None = None) -> None:
        self.name = name
        self.values = values

    def __repr__(self) -> str:
        if self.values is None:
            return self.name
        return f"{self.name}({', '.join(f'{name}={value!r}' for name, value in self.values.items())})"


def _read(data: bytes, reader: _Reader) -> Any:
    try:
        return reader.read(_decoder()(data), 0)
    except ReqtableError:
        raise
    except Exception as error:  # the bytes may be anything
        raise ReqtableError(f"not plain data: {type(error).__name__}: {error}") from None


@lru_cache(maxsize=1)
def _encoder() -> Any:
    return _msgpack().Encoder().encode


@lru_cache(maxsize=1)
def _decoder() -> Any:
    return _msgpack().Decoder().decode


def refusal_of(value: Any) -> str | None:
    """Return why a value is no plain data; None if it is. Nothing is written, so this needs no package."""
    try:
        _Writer(no_attachment, _SCALARS).written(value, 0)
    except NotMovable as error:
        return str(error)
    return None


def place_of(value: Any) -> str:
    """Return the place of what `encode` refuses in `value`, such as "['rooms'][3]"; "" if that is `value` itself."""
    place, depth = "", 0
    parts = _parts_of(value)
    while depth < DEPTH_MAX and (found := next((each for each in parts if not _can_encode(each[1])), None)):
        place += found[0]
        parts, depth = _parts_of(found[1]), depth + 1
    return place


def _parts_of(value: Any) -> list[tuple[str, Any]]:
    """Return the values within a value, each with how to write its place."""
    if isinstance(value, dict):
        return [(f"[{key!r}]", part) for key, each in value.items() for part in (key, each)]
    if isinstance(value, set | frozenset):
        return [(f"[{each!r}]", each) for each in value]
    if isinstance(value, list | tuple):
        return [(f"[{number}]", each) for number, each in enumerate(value)]
    kind: Any = type(value)
    return [(f".{name}", getattr(value, name)) for name in shape_of(kind).fields if hasattr(value, name)]


def _can_encode(value: Any) -> bool:
    try:
        encode(value)
    except NotMovable:
        return False
    return True


def _msgpack() -> Any:
    try:
        from msgspec import msgpack  # only here: most programs make no records
    except ImportError:
        raise ReqtableError("records of requests need the package msgspec: pip install msgspec") from None
    return msgpack


class _Writer:
    """Turns values into what MessagePack can write. It writes values of the types `as_they_are` without a look."""

    def __init__(self, attach: Attach, as_they_are: Collection[type]) -> None:
        self._attach = attach
        self._as_they_are = as_they_are

    def written(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind in self._as_they_are:
            return value
        if kind is str:
            return value if value.isascii() else _text(value)
        if kind is int:
            return value if value.bit_length() <= _INT_BITS else _large(value)
        if depth > DEPTH_MAX:
            raise NotMovable(f"values are nested more than {DEPTH_MAX} deep, or contain themselves")
        if kind is list:
            return self._list(value, depth + 1)
        if kind is dict:
            return self._dict(value, depth + 1)
        if kind is tuple or kind is set or kind is frozenset:
            return {_KIND: kind.__name__, "v": self._list(value, depth + 1)}
        if kind is bytearray:
            return {_KIND: "bytearray", "v": bytes(value)}
        return self._object(value, kind, depth + 1)

    def _list(self, values: Iterable[Any], depth: int) -> list[Any]:
        plain = self._as_they_are
        return [each if type(each) in plain else self.written(each, depth) for each in values]

    def _dict(self, value: dict[Any, Any], depth: int) -> Any:
        plain = self._as_they_are
        if _KIND not in value and _are_words(value):
            return {key: each if type(each) in plain else self.written(each, depth) for key, each in value.items()}
        return {_KIND: "dict", "v": [self._list(value, depth), self._list(value.values(), depth)]}

    def _object(self, value: Any, kind: type, depth: int) -> Any:
        attached = self._attach(value)
        if attached is not None:
            return {_KIND: attached[0], "v": self.written(attached[1], depth)}
        if isinstance(value, Enum):
            name = value.name
            if name not in kind.__members__:  # type: ignore[attr-defined]
                raise NotMovable(f"{value!r} is no single member of {kind.__qualname__}")
            return {_KIND: "member", "c": _name_of(kind), "v": name}
        shape = shape_of(kind)
        if shape.refusal:
            raise NotMovable(shape.refusal)
        shape.check(value)
        found = {name: self.written(getattr(value, name), depth) for name in shape.fields}
        return {_KIND: "object", "c": _name_of(kind), "v": found}


class _Reader:
    """Turns what MessagePack has read into values."""

    def __init__(self, attached: Mapping[str, Callable[[Any], Any]], lenient: bool) -> None:
        self._attached = attached
        self._lenient = lenient

    def read(self, value: Any, level: int) -> Any:
        kind = type(value)
        if kind in _AS_THEY_ARE:
            return value
        level += 1
        if level > _LEVELS_MAX:
            raise ReqtableError("not plain data: its values are nested too deep")
        if kind is list:
            return [each if type(each) in _AS_THEY_ARE else self.read(each, level) for each in value]
        if kind is not dict:
            raise ReqtableError(f"not plain data: a {kind.__name__} is in it")
        if _KIND not in value:
            return {
                name: each if type(each) in _AS_THEY_ARE else self.read(each, level) for name, each in value.items()
            }
        return self._tagged(value[_KIND], value["v"], value.get("c"), level)

    def _tagged(self, kind: str, value: Any, name: Any, level: int) -> Any:
        make = self._attached.get(kind) or _MAKERS.get(kind)
        if make is not None:
            return make(self.read(value, level))
        if kind == "object":
            return self._object(name, self.read(value, level))
        if kind == "member":
            return self._member(name, value)
        raise ReqtableError(f"not plain data: values of kind {kind!r} are not known")

    def _member(self, name: str, member: str) -> Any:
        found = class_named(name)
        if found is None or not issubclass(found, Enum) or member not in found.__members__:
            if self._lenient:
                return member
            raise ReqtableError(f"{name} is no Enum with a member {member!r}")
        return found.__members__[member]

    def _object(self, name: str, values: dict[str, Any]) -> Any:
        found = class_named(name)
        shape = None if found is None else shape_of(found)
        if shape is None or shape.refusal or issubclass(found, Enum):
            misfit: str | None = f"{name} is not there as a class of plain data"
        else:
            misfit = shape.misfit(values)
        if misfit is None:
            assert isinstance(shape, Shape)
            return shape.make(values)
        if self._lenient:
            return values
        raise ReqtableError(misfit)


class _Describer(_Reader):
    """Turns what MessagePack has read into values, but makes no object."""

    def _member(self, name: str, member: str) -> Any:
        return Described(f"{name}.{member}")

    def _object(self, name: str, values: dict[str, Any]) -> Any:
        return Described(str(name), values)


_MAKERS: dict[str, Callable[[Any], Any]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "bytearray": lambda data: bytearray(memoryview(data)),  # of a number, it would be that long
    "dict": lambda parts: dict(zip(*parts, strict=True)),  # its keys, and its values
    "int": lambda data: int.from_bytes(data, "big", signed=True),
    "text": lambda data: data.decode("utf-8", "surrogatepass"),
}


def _are_words(keys: Iterable[Any]) -> bool:
    """Return whether all keys are plain ASCII, which MessagePack's maps may have."""
    for key in keys:  # noqa: SIM110  # all(…) would make a generator
        if type(key) is not str or not key.isascii():
            return False
    return True


def _large(value: int) -> Any:
    return {_KIND: "int", "v": value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True)}


def _text(value: str) -> Any:
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, as in the names of files
        return {_KIND: "text", "v": value.encode("utf-8", "surrogatepass")}
    return value


@lru_cache(maxsize=1024)
def _name_of(kind: type) -> str:
    name = f"{kind.__module__}:{kind.__qualname__}"
    if class_named(name) is not kind:
        raise NotMovable(f"{kind.__qualname__} can't be found by its name: define it at the top of a module")
    return name


def class_named(name: str) -> Any:
    """Return the class `module:name` if the process has imported its module; else None. Nothing is imported.

    Only namespaces of modules and classes are looked at: reading an attribute could run code.
    """
    module, _, rest = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in rest.split("."):
        found = getattr(found, "__dict__", {}).get(part)
    return found if isinstance(found, type) else None
