"""A chat room for browsers: one handler serves the page, and the WebSockets that the page opens.

The room is the table itself, as in chat.py. A browser that doesn't read is closed when its output exceeds the limit.

    reqtable serve examples/websocket_chat.py:Room --bind tcp://127.0.0.1:8000      then open http://127.0.0.1:8000

A browser first sends a name, and then what its user says. It gets JSON: {"from": "ann", "text": "hello"} for what
somebody said, and {"text": "ann has joined"} for what happened.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from reqtable import Transition, state
from reqtable.http import WebSocketHandler, ws_message

PAGE = Path(__file__).with_suffix(".html").read_text()
PAGE_FIELDS = {"Content-Security-Policy": "default-src 'self' 'unsafe-inline'; img-src data:"}  # nothing from elsewhere
NAME_BYTES_MAX = 80
NAME_REFUSED = 4001  # the code with which a WebSocket closes; the codes from 4000 on are the application's


class Room(WebSocketHandler):
    """Serves one browser, whose user gives a name and then talks."""

    name: str = ""

    message_bytes_max = 4096
    ping_s = 30.0  # proxies close connections that are silent for a minute

    def do_GET(self) -> Transition:
        if self.request.path != "/":
            return self.answer(404)
        return self.answer(200, PAGE, PAGE_FIELDS, content_type="text/html; charset=utf-8")

    @state(ws_message(limit=NAME_BYTES_MAX), timeout=30)
    def hello(self, message: str | bytes) -> Transition:
        name = str(message).strip()
        here = sorted(other.name for other in self.room())
        if not name or name in here:
            self.close_ws(NAME_REFUSED, "that name is taken" if name else "a name is needed")
            return None
        self.name = name
        if here:
            self.send_text(json.dumps({"text": f"here: {', '.join(here)}"}))
        self.tell_all({"text": f"{name} has joined"})
        return self.talk

    @state(ws_message())
    def talk(self, message: str | bytes) -> Transition:
        if isinstance(message, bytes):
            self.close_ws(1003, "this room is for text")
            return None
        self.tell_all({"from": self.name, "text": message})
        return self.talk

    def on_close(self) -> None:
        if self.name:
            self.tell_all({"text": f"{self.name} has left"})

    def room(self) -> "Iterator[Room]":
        """Yield the handlers of all browsers whose users have given a name."""
        for entry in self.server.table:
            if isinstance(entry.handler, Room) and entry.handler.name:
                yield entry.handler

    def tell_all(self, what: dict[str, str]) -> None:
        text = json.dumps(what)
        for each in self.room():
            each.send_text(text)  # dropped if that WebSocket is closed
