"""A chat room: the requests of one table write to each other.

The room is the table itself: a client that has given a name is in the room. A client that doesn't read its output is
closed when the output exceeds its limit. It doesn't hold up the others. A restart moves all clients at the same time,
so nobody misses what is said.

    reqtable serve examples/chat.py:Chat      then, twice:      nc 127.0.0.1 7000
"""

from collections.abc import Iterator
from typing import Any

from reqtable import StateRequestHandler, Transition, line, state


class Chat(StateRequestHandler):
    """Serves one client, who gives a name and then talks. /who lists the room, /quit leaves it."""

    name: str = ""

    def start(self) -> Transition:
        self.send(b"your name? ")
        return self.hello

    @state(line(limit=64), timeout=60)
    def hello(self, text: bytes) -> Transition:
        name = text.strip().decode("utf-8", "replace")
        if not name or name in [other.name for other in self.room()]:
            self.send(b"that name is taken. your name? ")
            return self.hello
        self.name = name
        self.tell_others(f"* {name} has joined")
        return self.talk

    @state(line(limit=1024), timeout=3600)
    def talk(self, text: bytes) -> Transition:
        said = text.strip().decode("utf-8", "replace")
        if said == "/quit":
            return None
        if said == "/who":
            self.send(", ".join(sorted(other.name for other in self.room())).encode() + b"\n")
        elif said:
            self.tell_others(f"{self.name}: {said}")
        return self.talk

    def on_close(self) -> None:
        if self.name:
            self.tell_others(f"* {self.name} has left")

    @classmethod
    def save_state(cls, server: Any) -> None:
        """Return nothing: the table is all that is shared. Because of this hook, all clients move at the same time."""

    @classmethod
    def restore_state(cls, server: Any, data: None) -> None:
        """Take nothing."""

    def room(self) -> "Iterator[Chat]":
        """Yield the handlers of all clients that have given a name."""
        for entry in self.server.table:
            if isinstance(entry.handler, Chat) and entry.handler.name:
                yield entry.handler

    def tell_others(self, text: str) -> None:
        for other in self.room():
            if other is not self:
                other.send(text.encode() + b"\n")
