"""Server-sent events as bytes (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

import re

from reqtable.table.errors import HandlerError

_LINE_END = re.compile("\r\n|\r|\n")


def encode_event(data: str = "", event: str | None = None, id: str | None = None, retry: int | None = None) -> bytes:
    """Return a server-sent event as bytes (HTML Living Standard, 9.2). Without arguments, return a comment.

    `event` is the type of the event. `retry` is the time in milliseconds after which a client connects again. Raises
    HandlerError if the type or the id has an end of line, or if the id has a NUL: a client would read another event.
    """
    lines = []
    for name, value in (("event", event), ("id", id)):
        if value is not None:
            if _LINE_END.search(value) or (name == "id" and "\0" in value):
                raise HandlerError(f"the {name} of an event can't be {value!r}: give one line of text")
            lines.append(f"{name}: {value}\n")
    if retry is not None:
        if not isinstance(retry, int) or retry < 0:
            raise HandlerError(f"retry is a whole number of milliseconds, not {retry!r}")
        lines.append(f"retry: {int(retry)}\n")
    if data or event is not None:
        lines += [f"data: {line}\n" for line in _LINE_END.split(data)]
    return "".join([*(lines or [":\n"]), "\n"]).encode()
