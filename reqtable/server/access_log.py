"""The access log (logger `reqtable.access`, level INFO: one line a request), and log formatters for text and JSON."""

from __future__ import annotations

import json
import logging
import time
from threading import get_ident
from typing import Any

from reqtable.loop.failures import REPORTED
from reqtable.loop.process import LOOPS
from reqtable.table.addresses import address_text, printable
from reqtable.table.snapshot import handler_name
from reqtable.table.states import Ending
from reqtable.table.table import Entry
from reqtable.table.tracebacks import bounded

OF_SIGNALS = "reqtable.table"  # the logger of the answers to signals
access = logging.getLogger("reqtable.access")
# Off by default: a log handler may be a client of this very server, and each line would cause another.
access.setLevel(logging.WARNING)


def log_access(entry: Entry) -> None:
    """Log an ended request in one line. The attribute `request` of the record has the fields, for a JSON formatter."""
    request = {
        "id": entry.id,
        "local": address_text(entry.local),
        "peer": address_text(entry.peer),
        "handler": handler_name(entry.handler),
        "ending": (entry.ending or Ending.DONE).value,
        "duration_s": round(entry.table.now - entry.created_at, 6),
        "bytes_in": entry.bytes_in,
        "bytes_out": entry.bytes_out,
        "steps": entry.steps,
        "policy": entry.policy.name,
    }
    text = "%(peer)s %(handler)s %(ending)s in %(duration_s).3f s, %(bytes_in)d in, %(bytes_out)d out, %(steps)d steps"
    access.info(text, request, extra={"request": request})


def _id_of(record: logging.LogRecord) -> int | None:
    """Return the id of the request whose step has logged `record`; None if no step has.

    The answer to a signal is logged in the middle of any step, and is of no request.
    """
    return None if record.name == OF_SIGNALS else running_id()


def running_id() -> int | None:
    """Return the id of the request whose step or error is handled in this thread, for the log; None: there is none."""
    if (reported := REPORTED.get(get_ident())) is not None:
        return reported
    loop = LOOPS.get(get_ident())
    running = None if loop is None else loop.table.running
    return None if running is None else running.id


class TextFormatter(logging.Formatter):
    """Formats a record as text for a terminal. Indents tracebacks: they may quote what a peer sent to fake a record.

    `%(of_request)s` in the format is `request 12: ` if the record comes from a step of that request, else nothing.
    """

    def format(self, record: logging.LogRecord) -> str:
        id = _id_of(record)
        record.of_request = "" if id is None or hasattr(record, "request_id") else f"request {id}: "
        return "\n".join(map(printable, super().format(record).split("\n")))

    def formatException(self, *error: Any) -> str:  # noqa: N802
        return "    " + bounded(super().formatException(*error)).replace("\n", "\n    ")


class JSONFormatter(logging.Formatter):
    """Formats a record as a line of JSON.

    The keys are `at`, `pid`, `level`, `logger` and `message`; `id` of the request whose step has logged it; `traceback`
    if there is one; a finished request's fields.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "at": self.formatTime(record),
            "pid": record.process,
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        id = _id_of(record)
        if id is not None:
            line["id"] = id
        if record.exc_info:
            line["traceback"] = bounded(self.formatException(record.exc_info))
        return json.dumps(line | getattr(record, "request", {}))  # ASCII, for any terminal and encoding

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        """Return the time of the record as in RFC 3339, with milliseconds."""
        at = time.localtime(record.created)
        zone = time.strftime("%z", at)
        return f"{time.strftime('%Y-%m-%dT%H:%M:%S', at)}.{int(record.msecs):03d}{zone[:3]}:{zone[3:]}"
