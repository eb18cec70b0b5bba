"""Changes of a configuration while it is in force: sets some values by hand, and compares two configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from math import inf
from typing import Any

from reqtable.config.config import Config, effective
from reqtable.config.options import hints
from reqtable.config.unknown_keys import key_meant, mend_of_key
from reqtable.table.errors import ConfigurationError

_AT_START = ("workers", "takeover", "control", "origins")  # these count only when a program starts


def changed(config: Config, changes: Mapping[str, Any], origin: str) -> Config:
    """Return `config` with other values for some keys, such as `{"limits.entries_max": 5000}`.

    `origin` says where the values come from. Raises ConfigurationError, naming the key, for what can't be set.
    """
    origins = dict(config.origins)
    for key, value in changes.items():
        parts = key.split(".")
        if parts[0] in _AT_START:
            raise ConfigurationError(f"{key} can't be set while the server runs: change the file, and restart")
        config = _with(config, parts, value, key)
        origins[key] = origin
    return replace(config, origins=origins)


def differences(before: Config, now: Config) -> list[dict[str, Any]]:
    """Return the keys whose values differ, each with its value `before`, its value `now` and the `origin` of that.

    `after_restart` says whether the value counts only when the program starts again.
    """
    old = {key: value for key, value, _ in effective(before)}
    new = {key: (value, origin) for key, value, origin in effective(now)}
    return [
        {
            "key": key,
            "before": was,
            "now": is_now,
            "origin": origin,
            "after_restart": at_restart(key, was, is_now),
        }
        for key in {**old, **new}
        for was, (is_now, origin) in [(old.get(key), new.get(key, (None, "")))]
        if was != is_now
    ]


def at_restart(key: str, before: Any, now: Any) -> bool:
    """Return whether a change counts only after a restart. A supervisor takes another number of workers as it runs."""
    return None in (before, now) if key == "workers" else key.partition(".")[0] in _AT_START


def _with(part: Any, parts: list[str], value: Any, key: str) -> Any:
    """Return a copy of a part of the configuration, with a value below it replaced."""
    first, *more = parts
    names = [each.name for each in fields(part) if each.name != "origins"]
    if first not in names:
        meant = key_meant(key, part.__class__) if first == key else None
        prefix = key[: -len(".".join(parts))]
        mend = mend_of_key(first, names, prefix) if meant is None else f"did you mean {'.'.join(meant)}?"
        raise ConfigurationError(f"there is no key {key}: {mend}")
    own = getattr(part, first)
    if more:
        if isinstance(own, Mapping):
            raise ConfigurationError(f"{key} can't be set by itself: change the file, and reload")
        if not is_dataclass(own):
            table = key.removesuffix("." + ".".join(more))
            raise ConfigurationError(f"there is no key {key}: did you mean {table}?")
        value = _with(own, more, value, key)
    elif is_dataclass(own):
        raise ConfigurationError(f"{key} is a table: name a key in it, such as {key}.{fields(own)[0].name}")
    elif value == "inf" and "float" in str(hints(part.__class__).get(first)):
        value = inf  # JSON has no number for it
    elif isinstance(value, list) and "tuple" in str(hints(part.__class__).get(first)):
        value = tuple(value)
    try:
        return replace(part, **{first: value})
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
