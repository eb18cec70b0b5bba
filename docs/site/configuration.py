"""The configuration keys, from `Config`: each with its type, its default, its unit, and the text below its field."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from types import UnionType
from typing import Any, get_args, get_origin

from docs.site.texts import texts_of
from reqtable.config import Config, changed
from reqtable.config.changes import at_restart
from reqtable.config.options import hints
from reqtable.table.errors import ConfigurationError

_KINDS = {bool: "true or false", int: "whole number", float: "number", str: "string", tuple: "list", Mapping: "table"}


def configuration() -> str:
    """Return a chapter for each table of the file, and in it a part for each key."""
    parts = []
    chapter = ""
    for key, field, cls in keys():
        name = key.rpartition(".")[0]
        if name != chapter:
            chapter = name
            parts.append(f"## `[{chapter}]` {{ #{chapter} }}\n\n{(cls.__doc__ or '').splitlines()[0]}")
        heading = f'### `{key}` {{ #{key} data-toc-label="{field.name}" }}'
        facts = " · ".join(_facts(key, field, cls))
        parts.append(f"{heading}\n\n{facts}\n{{ .facts }}\n\n{texts_of(cls)[field.name]}")
    return "\n\n".join(parts)


def keys() -> Iterator[tuple[str, Field[Any], type]]:
    """Yield each key of a configuration file, with its field and the class that has the field."""
    yield from _keys_of(Config, "")


def _keys_of(cls: type, prefix: str) -> Iterator[tuple[str, Field[Any], type]]:
    tables = []
    for field in fields(cls):
        hint = hints(cls)[field.name]
        many = get_args(hint)[1] if get_origin(hint) is Mapping else None
        if is_dataclass(hint):
            tables.append((hint, f"{prefix}{field.name}."))
        elif is_dataclass(many):
            tables.append((many, f"{prefix}{field.name}.NAME."))
        elif field.name != "origins":
            yield prefix + field.name, field, cls
    for inner, name in tables:
        assert isinstance(inner, type)
        yield from _keys_of(inner, name)


def _facts(key: str, field: Field[Any], cls: type) -> Iterator[str]:
    """Yield the type with its unit, the default, and what changes the value while the server runs."""
    hint = hints(cls)[field.name]
    plain = get_args(hint)[0] if get_origin(hint) is UnionType else hint
    kind = get_origin(plain) or plain
    yield _KINDS[kind] + _unit(field.name, kind)
    value = field.default if field.default is not MISSING else None
    yield "no default" if value in (None, (), "") else f"default `{json.dumps(value)}`"
    if _can_be_set(key, value):
        yield "changed by `reqtable set` and SIGHUP"
    elif not at_restart(key, 1, 2):
        yield "changed by SIGHUP"
    else:
        yield "read at the start only"


def _unit(name: str, kind: Any) -> str:
    """Return the unit that the name of a key says."""
    if kind not in (int, float):
        return ""
    what = " of bytes" if "bytes" in name else ""
    if "_per_s_" in name:
        return f"{what}, each second"
    return " of seconds" if name.endswith("_s") else what


def _can_be_set(key: str, value: Any) -> bool:
    try:
        changed(Config(), {key: value}, "")
    except ConfigurationError as error:
        return "can't be set" not in str(error)
    return True
