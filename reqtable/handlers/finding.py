"""A finding: what is wrong with a handler class, at which line, and what to write instead."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from reqtable.table.errors import HandlerError

E = TypeVar("E", bound=Exception)


class Finding(NamedTuple):
    """Tells one thing that is wrong with a handler class. `place` is `file:line` of the author's code."""

    kind: str
    place: str
    text: str
    mend: str
    refuses: bool = True  # the class can't be served; False: it can, but the author has probably meant something else

    def __str__(self) -> str:
        return f"{self.text}: {self.mend} ({self.place})"


def refusal(kind: str, place: str, text: str, mend: str) -> HandlerError:
    """Return the error that tells a finding, which a handler class can't be made with."""
    return carrying(HandlerError, Finding(kind, place, text, mend))


def carrying(made: type[E], finding: Finding) -> E:
    """Return an error whose message is `finding`, and which has it as its attribute."""
    error = made(str(finding))
    error.finding = finding  # type: ignore[attr-defined]
    return error


def finding_in(error: BaseException | None) -> Finding | None:
    """Return the finding that an error carries; None if it carries none."""
    return getattr(error, "finding", None)
