"""Actions whose user has given up before the server came to them: none of them is done."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest

import reqtable
from reqtable import Config, ControlOptions, StateRequestHandler, line, state
from tests.control import Operator, UnixConnection
from tests.support import WAIT_S, Client, serving

_begun, _release = threading.Event(), threading.Event()


class Held(StateRequestHandler):
    """Echoes lines; `hold` holds up the loop until `_release` is set."""

    @state(line())
    def command(self, item: bytes) -> Any:
        if item == b"hold\n":
            _begun.set()
            _release.wait(WAIT_S)
        self.send(item)
        return self.command


ACTIONS = [
    ("POST", "/v1/requests/1/cancel", None),
    ("POST", "/v1/requests/cancel", {"ids": [1]}),
    ("POST", "/v1/drain", {}),
    ("POST", "/v1/drain", {"stay": True}),
    ("PATCH", "/v1/config", {"limits.entries_max": 7}),
    ("POST", "/v1/reload", {}),
    ("PUT", "/v1/log-level", {"logger": "tests.control_late", "level": "error"}),
]


@pytest.mark.parametrize(("method", "target", "body"), ACTIONS, ids=lambda each: str(each))
def test_an_action_is_not_begun_when_its_user_has_gone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str, target: str, body: Any
) -> None:
    _begun.clear()
    _release.clear()
    path = str(tmp_path / "c.sock")
    server = reqtable.TCPServer(("127.0.0.1", 0), Held, config=Config(control=ControlOptions(socket=path)))
    operator = Operator(path)
    with caplog.at_level(logging.WARNING), serving(server), Client(server.server_address) as client:
        assert client.ask(b"one\n") == b"one\n"
        limit = server.engine.limits.entries_max
        client.send(b"hold\n")
        assert _begun.wait(WAIT_S)
        gone = UnixConnection(path)
        gone.request(method, target, json.dumps(body) if body is not None else None)
        gone.close()
        _release.set()
        assert client.line() == b"hold\n"
        while not any("not done, because the user has gone" in text for text in caplog.messages):
            operator.get("/v1/stats")
        assert client.ask(b"still\n") == b"still\n"
        stats = operator.get("/v1/stats")
        assert (stats["entries"], stats["is_draining"], stats["changed_s"]) == (1, False, None)
        assert server.engine.limits.entries_max == limit
        assert logging.getLogger("tests.control_late").level == logging.NOTSET
