"""A chat room: entries of one table that write to each other.

The room is the table itself: whoever has given a name is in it. One who doesn't read is closed by the bound on its
output; the others are not held up.

    reqtable serve examples/chat.py:Chat      then, twice:      nc 127.0.0.1 7000
"""

from collections.abc import Iterator

from reqtable import StateRequestHandler, Transition, line, state


class Chat(StateRequestHandler):
    """Say your name, then talk; /who lists the room, /quit leaves."""

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

    def room(self) -> "Iterator[Chat]":
        """Everyone who has given a name."""
        for entry in self.server.table:
            if isinstance(entry.handler, Chat) and entry.handler.name:
                yield entry.handler

    def tell_others(self, text: str) -> None:
        for other in self.room():
            if other is not self:
                other.send(text.encode() + b"\n")
