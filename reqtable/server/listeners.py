"""The listeners of one engine: for which servers it accepts requests, and when."""

from __future__ import annotations

from collections.abc import Iterator

from reqtable.loop.loop import Loop
from reqtable.net.listener import Listener
from reqtable.server.hosted import Hosted


class Listeners:
    """Listens for servers while their loop runs."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self.all: list[Listener] = []

    def __iter__(self) -> Iterator[Listener]:
        return iter(self.all)

    def __len__(self) -> int:
        return len(self.all)

    def listen(self, server: Hosted, most: int | None = None) -> Listener:
        """Accept requests for `server` while the loop runs, at most `most` in a pass."""
        self._loop.open()
        self.unlisten(server)
        server._prepare()
        listener = Listener(self._loop, server, most or self._loop.table.limits.accepts_per_pass)
        self.all.append(listener)
        return listener

    def unlisten(self, server: Hosted) -> None:
        """Stop accepting requests for `server`. New connections stay in the kernel's queue."""
        for listener in [each for each in self.all if each.server is server]:
            self.all.remove(listener)
            listener.close()

    def unlisten_for_good(self, server: Hosted) -> None:
        """Accept the connections that wait in the kernel's queue of `server`, then close its socket."""
        for listener in self.all:
            if listener.server is server:
                listener.take_the_last()
        self.unlisten(server)

    def pause(self, server: Hosted, error: OSError) -> None:
        """Stop accepting for `server` for a while: `error` says that descriptors or memory have run out."""
        for listener in self.all:
            if listener.server is server:
                listener.pause(error)

    def close(self) -> None:
        """Stop accepting requests for every server."""
        for listener in self.all:
            listener.close()
        self.all.clear()

    def forget(self) -> None:
        """In a forked child: drop the listeners, which are the parent's."""
        self.all.clear()
