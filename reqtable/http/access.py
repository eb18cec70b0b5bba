"""The access log of HTTP: one line a request, in the combined format, or all of it for a JSON formatter.

The logger `reqtable.access.http` is below `reqtable.access`, whose level decides whether there is a log.
"""

from __future__ import annotations

import logging
import re
import time
from typing import Protocol

from reqtable.http.messages import Reply, Request
from reqtable.table.addresses import address_text, host_text
from reqtable.table.states import Ending, State
from reqtable.table.table import Entry

access = logging.getLogger("reqtable.access.http")

_LEFT = 499  # no answer was sent, because the client left first; nginx has the same number
_UNQUOTABLE = re.compile(r'["\\]|[^\x20-\x7e]')


class Exchanged(Protocol):
    """The part of a handler that a line shows."""

    entry: Entry


def log_request(handler: Exchanged, request: Request, reply: Reply) -> None:
    """Log a request of `handler`, whose answer has been sent, or was broken off.

    The text is a line of the combined format, as nginx and Apache write it, then the id of the request and its seconds.
    The attribute `request` of the record has the fields for a JSON formatter.
    """
    entry, head = handler.entry, request.head
    unsent = entry.output.size if entry.state is State.CLOSED else 0
    sent = max(0, reply.sent - unsent)
    duration_s = entry.table.clock() - request.began_at
    status = reply.status or (_LEFT if entry.ending in (None, Ending.RESET) else 0)
    client = request.client or host_text(entry.peer)
    fields = {
        "id": entry.id,
        "request_id": request.id,
        "peer": address_text(entry.peer),
        "client": client,
        "method": head.method,
        "target": head.target,
        "version": f"{head.version[0]}.{head.version[1]}",
        "status": status,  # 0: the server ended the request without an answer
        "bytes_in": request.received,
        "bytes_out": sent,
        "duration_s": round(duration_s, 6),
        "is_whole": reply.is_done,
        "referer": head.get("referer"),
        "user_agent": head.get("user-agent"),
    }
    access.info(
        '%s - - [%s] "%s %s HTTP/%s" %d %d "%s" "%s" %s %.3f',
        client,
        time.strftime("%d/%b/%Y:%H:%M:%S %z"),
        head.method,
        _quoted(head.target),
        fields["version"],
        status,
        sent,
        _quoted(head.get("referer") or "-"),
        _quoted(head.get("user-agent") or "-"),
        _quoted(request.id),
        duration_s,
        extra={"request": fields},
    )


def _quoted(text: str) -> str:
    """Return text that a client chose so that it can't end its quotes, nor its line."""
    return _UNQUOTABLE.sub(lambda found: f"\\x{ord(found[0]):02X}", text)
