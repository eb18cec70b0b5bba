"""The listeners of one engine: whose sockets new requests are taken from, and when."""

from __future__ import annotations

from collections.abc import Iterator

from reqtable.loop.loop import Loop
from reqtable.net.listener import Listener
from reqtable.server.hosted import Hosted


class Listeners:
    """Listens for servers while their loop runs."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._listeners: list[Listener] = []

    def __iter__(self) -> Iterator[Listener]:
        return iter(self._listeners)

    def __len__(self) -> int:
        return len(self._listeners)

    def listen(self, server: Hosted, most: int | None = None) -> Listener:
        """Take new requests for `server` while the loop runs, at most `most` a pass."""
        self._loop.open()
        self.unlisten(server)
        server._prepare()
        listener = Listener(self._loop, server, most or self._loop.table.limits.accepts_per_pass)
        self._listeners.append(listener)
        return listener

    def unlisten(self, server: Hosted) -> None:
        """Take no more requests for `server`; the kernel's queue holds the clients that connect."""
        for listener in [each for each in self._listeners if each.server is server]:
            self._listeners.remove(listener)
            listener.close()

    def unlisten_for_good(self, server: Hosted) -> None:
        """Take the clients that have connected to `server`, and let no other connect."""
        for listener in self._listeners:
            if listener.server is server:
                listener.take_the_last()
        self.unlisten(server)

    def pause(self, server: Hosted, error: OSError) -> None:
        """No request can be had for `server`, for want of descriptors or memory: look again in a while."""
        for listener in self._listeners:
            if listener.server is server:
                listener.pause(error)

    def after_pass(self, now: float, freed: bool) -> None:
        """Listen again where there is room again; `freed` says that something has closed in this pass."""
        for listener in self._listeners:
            if not listener.watched:
                listener.listen_again_if_room(now, freed)

    def close(self) -> None:
        """Unlisten for every server."""
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()

    def forget(self) -> None:
        """In a forked child: all of them are the parent's."""
        self._listeners.clear()
