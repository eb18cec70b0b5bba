"""A time on the command line: `40`, `0.5`, or as the commands print ages, such as `5s`, `2m23s`, `1h05m` or `3d04h`."""

from __future__ import annotations

import re
from typing import Any

import click

_UNITS_S = {"d": 86_400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_PART = r"(?:(\d+(?:\.\d+)?){})?"
_TIME = re.compile("".join(_PART.format(unit) for unit in _UNITS_S))


class Seconds(click.ParamType[float]):
    """Turns a time into seconds."""

    name = "time"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> float:
        seconds = seconds_of(str(value))
        if seconds is None:
            self.fail(f"{value!r} is no time: give seconds, such as 40, or 2m23s", parameter, context)
        return seconds


def seconds_of(text: str) -> float | None:
    """Return the seconds that a text means; None if it means no time."""
    if re.fullmatch(r"\d+(\.\d*)?|\.\d+", text):
        return float(text)
    parts = _TIME.fullmatch(text)
    if not text or parts is None:
        return None
    return sum(float(part or 0) * unit for part, unit in zip(parts.groups(), _UNITS_S.values(), strict=True))
