"""Shows an error with the user's line first: tracebacks without this package's frames, and an account in one line."""

from __future__ import annotations

import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from opcode import opmap
from pathlib import Path
from types import FrameType, TracebackType

from reqtable.table.addresses import printable
from reqtable.table.errors import ConfigurationError, HandlerError, PeerError
from reqtable.table.suggestions import text_of

_PACKAGE = __name__.partition(".")[0]
_OWN = f"{Path(__file__).parent.parent}/"
_INSTALLED = ("site-packages", "dist-packages")
# The packages that run the user's code. Their frames above that code tell its author nothing.
RUNNERS = {_PACKAGE, "click", "concurrent", "importlib", "socketserver", "threading"}
_RAISES = opmap["RAISE_VARARGS"]
_AT = "_raised_at"  # the attribute of an error whose traceback does not have its place: it is from another process, say
NOTED = {_AT, "__notes__"}  # the attributes that `note_traceback` sets
_TEXT_MAX = 300  # characters of an error's text in one line of the log
_HALF_MAX = 32_768  # characters of a traceback that are shown of its beginning, and of its end
_HAS_PLACE = re.compile(r"\(\S+\.py:\d+\)$")


def trim(error: BaseException) -> bool:
    """Leave only the user's frames in the traceback of `error` and of each error that led to it, and those below.

    If this package raised the error because of the user's mistake, the frames below the user's go, too. Any other
    traceback without a frame of the user stays whole. Returns whether any traceback has such a frame.
    """
    found = False
    for each in _led_to(error):
        own = _users_part(each.__traceback__)
        if own is not None or isinstance(each, HandlerError | ConfigurationError | PeerError):
            each.__traceback__ = own
        found = found or own is not None
    return found


def account_of(error: BaseException) -> str:
    """Describe `error` in one line: `Type: text, in Notes.command (file:line)`, with the user's line that failed.

    The function is left out if a module failed. The line is left out if the text ends with a line already, or if no
    line of the user's is to blame.
    """
    text = " ".join(text_of(error).split())
    if len(text) > _TEXT_MAX:
        text = f"{text[:_TEXT_MAX]}…"
    text = printable(text)
    said = ": ".join(filter(None, (printable(type(error).__name__), text)))
    place = "" if _HAS_PLACE.search(text) else _raised_at(error)
    return said + place


def shown(error: BaseException) -> str:
    """Return the traceback of `error` and of what led to it, indented as the log indents it."""
    text = bounded("".join(traceback.format_exception(error)).rstrip())
    return "\n".join("    " + printable(each) for each in text.split("\n"))


def bounded(text: str) -> str:
    """Return a traceback with the middle left out if it is very long: an error's text may have all that a peer sent."""
    left_out = len(text) - 2 * _HALF_MAX
    return text if left_out <= 0 else f"{text[:_HALF_MAX]}…\n({left_out:,} characters left out)\n…{text[-_HALF_MAX:]}"


def blame(error: BaseException, place: object) -> None:
    """Have accounts of `error` name `place`, the user's line that led to it: no frame of the user's is running."""
    setattr(error, _AT, f", in {place}")


def blamed(error: BaseException) -> str:
    """Return the place that `blame` has set, as the end of a line about `error`; "" if there is none."""
    return getattr(error, _AT, "")


def note_traceback(error: BaseException) -> None:
    """Add the user's part of the traceback to `error` as a note, which goes with it to another process."""
    trim(error)
    place = _raised_at(error)
    if place:
        setattr(error, _AT, place)
    error.add_note("In the worker:\n" + bounded("".join(traceback.format_exception(error)).rstrip()))


def is_of_program(file: str) -> bool:
    """Return whether a file belongs to the program or to a package it uses, not to us or the standard library."""
    return not file.startswith(("<", _OWN)) and (is_installed(file) or not file.startswith(_standard()))


def is_installed(file: str) -> bool:
    """Return whether a file is an installed package's. These are below the standard library's folder."""
    return any(each in file for each in _INSTALLED)


def package_of(frame: FrameType) -> str:
    name: str = frame.f_globals.get("__name__") or ""
    return name.partition(".")[0]


def _raised_at(error: BaseException) -> str:
    """Return the end of a line about `error`: the user's innermost line, and the method that the engine has called."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f" ({error.filename}:{error.lineno})"
    own = [each for each in _frames(error.__traceback__) if package_of(each.tb_frame) not in RUNNERS]
    if hasattr(error, _AT) or not own:
        return blamed(error)
    programs = [each for each in own if is_of_program(each.tb_frame.f_code.co_filename)]
    programs = [each for each in programs if not is_installed(each.tb_frame.f_code.co_filename)] or programs or own
    first, last = own[0].tb_frame.f_code, programs[-1].tb_frame.f_code
    outer, inner = (each.co_qualname.rpartition("<locals>.")[2] for each in (first, last))
    place = f"({last.co_filename}:{programs[-1].tb_lineno})"
    if last.co_name == "<module>":
        return f" {place}"
    return f", in {inner} {place}" + ("" if first is last or first.co_name == "<module>" else f", called by {outer}")


def _users_part(trace: TracebackType | None) -> TracebackType | None:
    """Return `trace` without the frames of what ran the user's code; None if no frame is the user's."""
    kept: list[TracebackType] = []
    ours: list[TracebackType] = []  # the frames since the user's last one, if the first of them is a runner's
    others: list[TracebackType] = []  # then the frames of the standard library: ours or the user's have called it
    for each in _frames(trace):
        package = package_of(each.tb_frame)
        is_inside = bool(ours) or not kept
        if package == _PACKAGE or (package in RUNNERS and is_inside):
            ours += [*others, each]
            others = []
        elif is_inside and package in sys.stdlib_module_names:
            others.append(each)
        else:
            kept += [*others, each]
            ours, others = [], []
    if not kept:
        return None
    ours += others
    if ours and not _is_for_user(ours):
        kept += ours
    for one, following in pairwise(kept):
        one.tb_next = following
    kept[-1].tb_next = None
    return kept[0]


def _is_for_user(ours: list[TracebackType]) -> bool:
    """Return whether our frames below the user's code raised on purpose: by a `raise`, or in place of an item."""
    code = ours[-1].tb_frame.f_code
    return ours[0].tb_frame.f_code.co_name == "__await__" or code.co_code[ours[-1].tb_lasti] == _RAISES


def _led_to(error: BaseException) -> Iterator[BaseException]:
    """Yield `error`, and each error that led to it or is part of it."""
    waiting: list[BaseException | None] = [error]
    seen = set()
    while waiting:
        each = waiting.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        waiting += [each.__cause__, each.__context__]
        if isinstance(each, BaseExceptionGroup):
            waiting += each.exceptions


def _frames(trace: TracebackType | None) -> Iterator[TracebackType]:
    while trace is not None:
        following = trace.tb_next
        yield trace
        trace = following


@cache
def _standard() -> tuple[str, ...]:
    return tuple(f"{sysconfig.get_path(name)}/" for name in ("stdlib", "platstdlib"))
