"""The access log of HTTP: one line a request, in the combined format, or all of it for a JSON formatter."""

from __future__ import annotations

import re
import time
from typing import Protocol

from reqtable.http.messages import Reply, Request
from reqtable.server.access_log import access
from reqtable.table.addresses import address_text, host_text
from reqtable.table.table import Entry

__all__ = ["access", "log_request"]

_UNQUOTABLE = re.compile(r'["\\]|[^\x20-\x7e]')


class Exchanged(Protocol):
    """The part of a handler that a line shows."""

    entry: Entry


def log_request(handler: Exchanged, request: Request, reply: Reply) -> None:
    """Log a request of `handler`, whose answer has been sent, or was broken off.

    The text is a line of the combined format, as nginx and Apache write it. The attribute `request` of the record has
    the fields for a JSON formatter, with the id of the request.
    """
    entry, head = handler.entry, request.head
    fields = {
        "id": entry.id,
        "request_id": request.id,
        "peer": address_text(entry.peer),
        "method": head.method,
        "target": head.target,
        "version": f"{head.version[0]}.{head.version[1]}",
        "status": reply.status,  # 0: the client left before an answer was sent
        "bytes_in": request.received,
        "bytes_out": reply.sent,
        "duration_s": round(entry.table.clock() - request.began_at, 6),
        "is_whole": reply.is_done,
        "referer": head.get("referer"),
        "user_agent": head.get("user-agent"),
    }
    access.info(
        '%s - - [%s] "%s %s HTTP/%s" %d %d "%s" "%s"',
        host_text(entry.peer),
        time.strftime("%d/%b/%Y:%H:%M:%S %z"),
        head.method,
        _quoted(head.target),
        fields["version"],
        reply.status,
        reply.sent,
        _quoted(head.get("referer") or "-"),
        _quoted(head.get("user-agent") or "-"),
        extra={"request": fields},
    )


def _quoted(text: str) -> str:
    """Return text that a client chose so that it can't end its quotes, nor its line."""
    return _UNQUOTABLE.sub(lambda found: f"\\x{ord(found[0]):02X}", text)
