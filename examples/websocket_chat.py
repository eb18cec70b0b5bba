"""Chat rooms for browsers: one handler serves the page, and the WebSockets that the page opens.

The page at / is one room, and each page such as /rooms/tea is another one. A browser that doesn't read is closed when
its output exceeds the limit.

    reqtable serve examples/websocket_chat.py:Room --bind tcp://127.0.0.1:8000      then open http://127.0.0.1:8000

A browser first sends a name, and then what its user says. It gets JSON: {"from": "ann", "text": "hello"} for what
somebody said, and {"text": "ann has joined"} for what happened.

A restart (`reqtable restart`) moves all browsers at the same time. A request keeps its id, so the rooms are plain data.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from reqtable import Transition, state
from reqtable.http import WebSocketHandler, ws_message

PAGE = Path(__file__).with_suffix(".html").read_text()
PAGE_FIELDS = {"Content-Security-Policy": "default-src 'self' 'unsafe-inline'; img-src data:"}  # nothing from elsewhere
PATH = re.compile(r"/|/rooms/\w{1,40}")
NAME_BYTES_MAX = 80
NAME_REFUSED = 4001  # the code with which a WebSocket closes; the codes from 4000 on are the application's


class Room(WebSocketHandler):
    """Serves one browser, whose user gives a name and then talks."""

    rooms: ClassVar[dict[str, dict[str, int]]] = {}  # by path, then by name: the ids of the requests

    room: str = ""
    name: str = ""

    message_bytes_max = 4096
    ping_s = 30.0  # proxies close connections that are silent for a minute

    @classmethod
    def save_state(cls, server: Any) -> dict[str, dict[str, int]]:  # noqa: ARG003
        return cls.rooms

    @classmethod
    def restore_state(cls, server: Any, data: dict[str, dict[str, int]]) -> None:
        """Add the rooms, without the browsers that could not move, such as those that use TLS.

        With workers, several old ones may give their rooms to one new worker.
        """
        for path, ids in data.items():
            for name, id in ids.items():
                if entry := server.table.get(id):
                    here = cls.rooms.setdefault(path, {})
                    while name in here:  # another old worker had a user of the same name
                        name += "'"
                    here[name], entry.handler.name = id, name

    def do_GET(self) -> Transition:
        if not PATH.fullmatch(self.request.path):
            return self.answer(404)
        return self.answer(200, PAGE, PAGE_FIELDS, content_type="text/html; charset=utf-8")

    def on_upgrade(self) -> Transition:
        self.room = self.request.path
        return None if PATH.fullmatch(self.room) else self.answer(404)

    @state(ws_message(limit=NAME_BYTES_MAX), timeout=30)
    def hello(self, message: str | bytes) -> Transition:
        name = message.strip() if isinstance(message, str) else ""
        here = self.rooms.get(self.room, {})
        if not name or name in here:
            self.close_ws(NAME_REFUSED, "that name is taken" if name else "a name is needed")
            return None
        if here:
            self.send_text(json.dumps({"text": f"here: {', '.join(sorted(here))}"}))
        self.name = name
        self.rooms.setdefault(self.room, {})[name] = self.entry.id
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
            del self.rooms[self.room][self.name]
            self.tell_all({"text": f"{self.name} has left"})
            if not self.rooms[self.room]:
                del self.rooms[self.room]

    def members(self) -> "Iterator[Room]":
        """Yield the handlers of all browsers in this room whose users have given a name."""
        for id in self.rooms[self.room].values():
            entry = self.server.table.get(id)
            if entry is not None:
                yield entry.handler

    def tell_all(self, what: dict[str, str]) -> None:
        text = json.dumps(what)
        for each in self.members():
            each.send_text(text)  # dropped if that WebSocket is closed
