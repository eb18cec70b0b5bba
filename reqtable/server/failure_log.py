"""Logs the error of a failed request, with the user's line first."""

from __future__ import annotations

import logging
from threading import get_ident

from reqtable.loop.failures import REPORTED
from reqtable.net.sockets import is_peers_doing
from reqtable.table.addresses import printable
from reqtable.table.errors import ConfigurationError, ConnectFailed, HandlerError, PeerError
from reqtable.table.tracebacks import account_of, blamed, trim

log = logging.getLogger("reqtable")


def log_failure(error: BaseException, peer: str) -> None:
    """Log `error` of a request of `peer`. See `BaseServer.handle_error`."""
    connection = getattr(error, "connection", None)
    if isinstance(error, ConnectFailed):
        log.warning("%s: %s", peer, printable(error))
    elif isinstance(error, OSError | PeerError) and connection is not None:
        log.warning("%s: %s: %s", peer, connection.address, printable(error))
    elif is_peers_doing(error):
        log.info("%s: %s", peer, printable(error))
    else:
        _log_bug(error, peer)


def _log_bug(error: BaseException, peer: str) -> None:
    """Log an error of the user's code or of ours: one line, then the traceback if it has a line that helps."""
    id = REPORTED.get(get_ident())
    known = {"request_id": id}  # the line has the id, so that the formatter need not write it
    who = peer if id is None else f"{peer}, request {id}"
    is_rule = isinstance(error, HandlerError | ConfigurationError)
    notes = getattr(error, "__notes__", [])
    if trim(error) or not (is_rule or notes):
        log.error("%s: %s", who, account_of(error), exc_info=error, extra=known)
    elif any("\n" in note for note in notes):  # the traceback of the process that ran the step
        log.error("%s: %s", who, account_of(error), exc_info=(type(error), error, None), extra=known)
    else:
        said = f"{error}{blamed(error)}" if is_rule else f"{type(error).__name__}: {error}"
        log.error("%s: %s", who, printable("; ".join([said, *notes])), extra=known)
