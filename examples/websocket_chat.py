"""A chat room for browsers: one handler serves the page, and the WebSockets that the page opens.

The room is the table itself, as in chat.py. A browser that doesn't read is closed when its output exceeds the limit.

    reqtable serve examples/websocket_chat.py:Room --bind tcp://127.0.0.1:8000      then open http://127.0.0.1:8000
"""

from collections.abc import Iterator
from pathlib import Path

from reqtable import Transition, state
from reqtable.http import WebSocketHandler, ws_message

PAGE = Path(__file__).with_suffix(".html").read_text()


class Room(WebSocketHandler):
    """Serves one browser, whose user gives a name and then talks."""

    name: str = ""

    message_bytes_max = 4096
    ping_s = 30.0  # proxies close connections that are silent for a minute

    def do_GET(self) -> Transition:
        if self.request.path != "/":
            return self.answer(404)
        return self.answer(200, PAGE, content_type="text/html; charset=utf-8")

    @state(ws_message(limit=64), timeout=300)
    def hello(self, message: str | bytes) -> Transition:
        name = str(message).strip()
        if not name or name in [other.name for other in self.room()]:
            self.send_text("* that name is taken: what is yours?")
            return self.hello
        self.name = name
        self.tell_all(f"* {name} has joined")
        return self.talk

    @state(ws_message())
    def talk(self, message: str | bytes) -> Transition:
        if isinstance(message, bytes):
            self.close_ws(1003, "this room is for text")
            return None
        self.tell_all(f"{self.name}: {message}")
        return self.talk

    def on_close(self) -> None:
        if self.name:
            self.tell_all(f"* {self.name} has left")

    def room(self) -> "Iterator[Room]":
        """Yield the handlers of all browsers whose users have given a name."""
        for entry in self.server.table:
            if isinstance(entry.handler, Room) and entry.handler.name:
                yield entry.handler

    def tell_all(self, text: str) -> None:
        for each in self.room():
            each.send_text(text)  # dropped if that WebSocket is closed
