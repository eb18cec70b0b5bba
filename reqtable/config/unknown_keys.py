"""Says how to mend a key that the configuration does not have."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import is_dataclass
from typing import Any

from reqtable.config.options import hints


def mend_of_key(name: str, names: Collection[str], prefix: str = "") -> str:
    """Return how to mend a `name` that is none of `names`: the name that was probably meant, after `prefix`."""
    near = _nearest(name, names)
    return f"there are {', '.join(names)}" if near is None else f"did you mean {prefix}{near}?"


def key_meant(name: str, root: Any) -> tuple[str, str] | None:
    """Return the table of the class `root`, and the key in it, that a `name` without a table probably means.

    None if no table has such a key, or if `root` itself has one that is nearly the same.
    """
    tables = {table: _keys_of(kind) for table, kind in hints(root).items() if is_dataclass(kind)}
    for table, keys in tables.items():
        if name in keys:
            return table, name
    if _nearest(name, hints(root)) is not None:
        return None
    near = _nearest(name, [key for keys in tables.values() for key in keys])
    return next(((table, near) for table, keys in tables.items() if near in keys), None)


def _keys_of(table: Any) -> list[str]:
    return list(hints(table))


def _nearest(name: str, names: Collection[str]) -> str | None:
    import difflib  # only a mistake needs it

    return next(iter(difflib.get_close_matches(name, names, n=1)), None)
