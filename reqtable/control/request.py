"""`ControlRequest`: a request to the control API. It asks a source, takes the batches, and notes who asks for what."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import Any, ClassVar
from urllib.parse import parse_qsl

import msgspec

from reqtable.control.jobs import END, Failed
from reqtable.control.query import Conflict, QueryError
from reqtable.control.source import Asking, Source
from reqtable.handlers.declaration import state
from reqtable.handlers.transition import Transition
from reqtable.http import HTTPRequestHandler
from reqtable.table.addresses import printable
from reqtable.table.errors import ConfigurationError
from reqtable.table.reaching import Arrived, disconnected, either, told
from reqtable.table.words import counted

log = logging.getLogger("reqtable.control")

JSON = "application/json"
_ERROR_CHARACTERS = 200
_CONFLICTS = (Conflict, ConfigurationError)
_TOLD_OR_GONE = either(told(), disconnected())


class ControlRequest(HTTPRequestHandler):
    """Asks the source of its server for an operation. A class derived from it has the resources."""

    server_name: ClassVar[str | None] = None

    _is_in_access_log: ClassVar[bool] = False  # that is for clients, and a page that looks each second would fill it

    _asking: Asking | None = None
    _then: Callable[[Any], Transition]
    _last: Any = None
    _acting: str | None = None  # what the user has the source do, until what came of it is logged

    # -- asking the source --------------------------------------------------------------------------------------------

    def _ask(self, operation: str, arguments: dict[str, Any], then: Callable[[Any], Transition]) -> Transition:
        """Ask the source. Go on with `then`, which gets the first batch and returns a transition."""
        source: Source = self.server.source
        self._asking = source.ask(operation, arguments)
        return self._pull(then)

    def _act(
        self, operation: str, arguments: dict[str, Any], then: Callable[[Any], Transition], text: str, *args: Any
    ) -> Transition:
        """Ask the source to do something. Log that the user has asked for it, with what came of it.

        Do nothing if the user has gone: a command that has given up has said that the server does not answer.
        """
        self._acting = text % args
        if self._has_left():
            self._note_result("not done, because the user has gone")
            return None
        return self._ask(operation, arguments, then)

    def _has_left(self) -> bool:
        """Return whether the other end has closed its side. The loop may not have read that yet."""
        own: socket.socket = self.entry.transport.request
        try:
            return not own.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _pull(self, then: Callable[[Any], Transition]) -> Transition:
        assert self._asking is not None
        self._then = then
        post = self.server.engine.post
        self._asking.pull(lambda batch: post(self.tell, (batch,)))
        return self.asking

    @state(_TOLD_OR_GONE)
    def asking(self, arrived: Arrived) -> Transition:
        """The source has the next batch, or the operator has gone."""
        if arrived.index:
            self._note_result("the user has gone before the answer")
            return None
        [batch] = arrived.item
        if isinstance(batch, Failed):
            return self._fail(batch.error)
        if self._acting is not None:
            self._note_result(_result_of(self.request.path, batch))
        return self._then(batch)

    def _log_end(self, by: Callable[..., Any]) -> None:
        """Log nothing, or operators who look would fill the log."""

    def on_close(self) -> None:
        if self._asking is not None:
            self._asking.close()
        super().on_close()

    # -- answers ------------------------------------------------------------------------------------------------------

    def _answer(self, status: int, data: Any) -> Transition:
        return self.answer(status, msgspec.json.encode(data) + b"\n", content_type=JSON)

    def _answer_batch(self, batch: Any) -> Transition:
        return self._answer(200, batch)

    def _answer_last(self, batch: Any) -> Transition:
        """Take the batches until the last one, and answer with its row."""
        if batch is END:
            return self._answer(200, self._last)
        [self._last] = batch
        return self._pull(self._answer_last)

    def _fail(self, error: Exception) -> Transition:
        self._note_result(f"refused: {error}")
        status = 400 if isinstance(error, QueryError) else 409 if isinstance(error, _CONFLICTS) else 500
        if status == 500:
            log.error("the control API failed", exc_info=error)
        if self.reply.status:
            raise error
        return self._answer(status, {"error": str(error)})

    def on_error(self, error: Exception) -> Transition:
        if isinstance(error, (QueryError, *_CONFLICTS)) and not self.reply.status:
            return self._fail(error)
        return super().on_error(error)

    # -- the request --------------------------------------------------------------------------------------------------

    def _query(self) -> dict[str, Any]:
        return dict(parse_qsl(self.request.query, keep_blank_values=True))

    def _body(self, *known: str) -> dict[str, Any]:
        """Return the body, a JSON object. If its keys are `known`, raises QueryError for any other."""
        found = self._object()
        for key in found if known else ():
            if key not in known:
                raise QueryError(f"{key!r} is not known in the body: write {' or '.join(known)}")
        return found

    def _object(self) -> dict[str, Any]:
        if not self.request.body:
            return {}
        try:
            found = msgspec.json.decode(self.request.body)
            msgspec.msgpack.encode(found)  # a supervisor sends it so to its workers, which takes no number above 2**64
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise QueryError(f"the body is not JSON: {error}"[:_ERROR_CHARACTERS]) from None
        except (OverflowError, RecursionError):
            raise QueryError("the body has a number that is too large, or is nested too deeply") from None
        if not isinstance(found, dict):
            raise QueryError("the body must be a JSON object")
        return found

    def _note_result(self, result: str) -> None:
        """Log once what came of an action, if this request is one, with the user who has asked for it."""
        acting, self._acting = self._acting, None
        if acting is not None:
            log.warning("control: %s %s: %s", self._user(), acting, printable(result))

    def _user(self) -> str:
        """Return for the log who asks."""
        return f"user {self.server.user_of(self.entry.transport.request)}"


def _result_of(path: str, batch: Any) -> str:
    """Return for the log what came of an action, by its path and the first batch of its answer."""
    if path.endswith("/cancel"):
        return f"ended {counted(len(batch), 'request')}"
    return "begun" if path == "/v1/restart" else "done"
