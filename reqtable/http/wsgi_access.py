"""The access log of WSGI applications: a line for each answer, in the combined format of Apache, or as JSON."""

from __future__ import annotations

import logging
import time
from typing import Any

from reqtable.table.addresses import address_text

answers = logging.getLogger("reqtable.http.access")
answers.setLevel(logging.INFO)


def log_answer(handler: Any, duration_s: float) -> None:
    """Log an answer. The attribute `request` of the record has the same as fields, for a JSON formatter.

    After the combined format come the id of the request and its seconds. A status 499 stands for no answer at all: the
    client has left.
    """
    head, reply, peer = handler.request.head, handler.reply, handler.client_address
    request = {
        "request_id": handler.request_id,
        "peer": str(peer[0]) if isinstance(peer, tuple) else address_text(peer) or "-",
        "method": head.method or "-",
        "target": head.target,
        "version": f"HTTP/{head.version[0]}.{head.version[1]}",
        "status": reply.status or 499,
        "body_bytes": reply.sent,
        "referer": head.get("referer", "-"),
        "user_agent": head.get("user-agent", "-"),
        "duration_s": round(duration_s, 6),
    }
    shown = {name: _quoted(value) if isinstance(value, str) else value for name, value in request.items()}
    shown["at"] = time.strftime("%d/%b/%Y:%H:%M:%S %z")
    text = (
        '%(peer)s - - [%(at)s] "%(method)s %(target)s %(version)s" %(status)d %(body_bytes)d "%(referer)s" '
        '"%(user_agent)s" %(request_id)s %(duration_s).3f'
    )
    answers.info(text, shown, extra={"request": request})


def _quoted(value: str) -> str:
    """Escape what could end a quoted part of the line."""
    return value.replace("\\", "\\\\").replace('"', '\\"')
