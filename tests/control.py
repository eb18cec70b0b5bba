"""A client of the control API for the tests."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Callable
from typing import Any

from tests.support import WAIT_S


class UnixConnection(http.client.HTTPConnection):
    """Speaks HTTP through a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("reqtable", timeout=WAIT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(WAIT_S)
        self.sock.connect(self._path)


class Operator:
    """Asks the control API at `path`, a new connection for each request."""

    def __init__(self, path: Any) -> None:
        self.path = str(path)

    def ask(self, target: str, method: str = "GET", body: Any = None) -> tuple[int, bytes]:
        """Return the status and the body of the answer."""
        connection = UnixConnection(self.path)
        try:
            connection.request(method, target, None if body is None else json.dumps(body))
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def get(self, target: str) -> Any:
        """Return what the body of a 200 says."""
        return self._checked(*self.ask(target))

    def post(self, target: str, body: Any = None, method: str = "POST") -> Any:
        return self._checked(*self.ask(target, method, {} if body is None else body))

    def _checked(self, status: int, body: bytes) -> Any:
        assert status == 200, (status, body)
        return json.loads(body)

    def rows_once(self, is_so: Callable[[list[Any]], Any], query: str = "") -> list[Any]:
        """Ask for rows until `is_so(rows)`. pytest-timeout is the backstop."""
        while True:
            rows: list[Any] = self.get(f"/v1/requests{query}")
            if is_so(rows):
                return rows
