"""Checks of the arguments of wants and of `@state`."""

from __future__ import annotations

from typing import Any


def check_timeout(timeout: Any) -> None:
    """Raise TypeError or ValueError unless `timeout` is a number of seconds above 0."""
    try:
        if timeout > 0:
            return
    except TypeError:
        raise TypeError(f"timeout must be a number of seconds, not {timeout!r}") from None
    raise ValueError(f"timeout must be seconds above 0, not {timeout!r}")


def whole_bytes(name: str, value: Any, least: int) -> int:
    """Return `value`. Raises TypeError or ValueError unless it is a whole number of bytes, `least` or more."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number of bytes, not {value!r}")
    if value < least:
        raise ValueError(f"{name} must be {least} or more bytes, not {value!r}")
    return value
