"""Sockets that systemd has opened and passed (sd_listen_fds(3))."""

from __future__ import annotations

import contextlib
import os

from reqtable.table.errors import ConfigurationError

_FIRST_PASSED = 3  # SD_LISTEN_FDS_START
_VARIABLE = "REQTABLE_ACTIVATED"  # set for a process that gets the sockets of systemd from the process before


class _Activation:
    """Remembers whether this process serves on sockets of systemd."""

    has_been = False


def is_activated() -> bool:
    """Return whether systemd has passed sockets to this process (sd_listen_fds(3)), or to the one before it."""
    return _is_passed_to_this() or _VARIABLE in os.environ


def _is_passed_to_this() -> bool:
    return os.environ.get("LISTEN_PID") == str(os.getpid())


def environment() -> dict[str, str]:
    """Return the variables for the process that is to take this one's place."""
    return {_VARIABLE: "1"} if _Activation.has_been else {}


def take_passed() -> list[tuple[int, str]]:
    """Return the descriptors that systemd has passed, with their names. Later calls, and children, don't see them.

    Raises ConfigurationError if the environment does not say how many there are.
    """
    _Activation.has_been = _Activation.has_been or is_activated()
    os.environ.pop(_VARIABLE, None)
    if not _is_passed_to_this():
        return []
    count = os.environ.get("LISTEN_FDS", "")
    if not count.isdecimal():
        raise ConfigurationError(f"environment LISTEN_FDS: {count!r} is not a number of descriptors")
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    for variable in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(variable, None)
    passed = [(_FIRST_PASSED + i, names[i] if i < len(names) else "") for i in range(int(count))]
    for number, _ in passed:
        with contextlib.suppress(OSError):  # its bind refuses a descriptor that is not open
            os.set_inheritable(number, False)
    return passed
