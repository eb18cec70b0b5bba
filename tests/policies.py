"""Handlers that say where they run, and what the tests of each dispatch policy do with them."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import reqtable
from reqtable import Config, ConfigurationError, Transition, line, state
from tests.support import WAIT_S, Client, serving, wait_until

ANY = ("127.0.0.1", 0)


class Where(reqtable.StreamRequestHandler):
    """Answers each line with the process and the thread that it runs in."""

    def handle(self) -> None:
        for _ in self.rfile:
            self.wfile.write(b"%d %d\n" % (os.getpid(), threading.get_ident()))


class StateWhere(reqtable.StateRequestHandler):
    @state(line())
    def command(self, text: bytes) -> Transition:
        self.send(b"%d %d\n" % (os.getpid(), threading.get_ident()))
        return self.command


class AsyncWhere(reqtable.AsyncRequestHandler):
    async def handle(self) -> None:
        while await self.read(line()):
            await self.send(b"%d %d\n" % (os.getpid(), threading.get_ident()))


class Held(reqtable.StateRequestHandler):
    """Holds whatever it runs in until the server's `gate` opens."""

    @state(line())
    def command(self, text: bytes) -> Transition:
        self.server.entered.release()
        assert self.server.gate.wait(WAIT_S)
        self.send(text)
        return self.command


class HeldBlocking(reqtable.StreamRequestHandler):
    def handle(self) -> None:
        for text in self.rfile:
            self.server.entered.release()
            assert self.server.gate.wait(WAIT_S)
            self.wfile.write(text)


@contextlib.contextmanager
def held(handler: Any, dispatch: str, **options: Any) -> Iterator[Any]:
    server = reqtable.TCPServer(ANY, handler, dispatch=dispatch, config=Config(**options))
    server.gate, server.entered = threading.Event(), threading.Semaphore(0)  # type: ignore[attr-defined]
    with serving(server):
        try:
            yield server
        finally:
            server.gate.set()  # type: ignore[attr-defined]


def where(client: Client) -> tuple[int, int]:
    pid, thread = client.ask(b"?\n").split()
    return int(pid), int(thread)


def empty(server: Any) -> None:
    wait_until(server, lambda: len(server.table) == 0)


class AsyncHandsOff(reqtable.AsyncRequestHandler):
    async def handle(self) -> None:
        lines = 0
        while text := await self.read(line()):
            lines += 1
            await self.send(b"%d %d\n" % (os.getpid(), threading.get_ident()))
            if name := text.strip(b"?\n").decode():
                try:
                    await self.hand_off(name)
                    await self.send(b"over after %d\n" % lines)
                except ConfigurationError as error:
                    await self.send(b"%s\n" % str(error).encode())
