"""The handlers of the conformance suite: three styles of the same protocol.

They are apart from the suite because a worker process of policy `executor` imports them, and nothing but them.
"""

from __future__ import annotations

import reqtable
from reqtable import Transition, datagram, line, state

BIG = bytes(range(256)) * 40_960  # 10 MiB
SHORT_S = 0.1
WAIT_S = 20.0  # longer than any dialogue


class StateTalk(reqtable.StateRequestHandler):
    """Echoes lines; `big` gets 10 MiB, `boom` half an answer and an error, the end of file a farewell."""

    lines: int = 0

    @state(line(limit=200))
    def command(self, text: bytes) -> Transition:
        self.lines += 1
        if text == b"big\n":
            self.send(BIG)
        elif text == b"boom\n":
            self.send(b"so far\n")
            raise ValueError("boom")
        else:
            self.send(text)
        return self.command

    def on_timeout(self) -> Transition:
        self.send(b"too slow after %d\n" % self.lines)

    def on_eof(self, partial: bytes) -> Transition:
        self.send(b"bye after %d: %s\n" % (self.lines, partial))


class HastyStateTalk(StateTalk):
    @state(line(limit=200), timeout=SHORT_S)
    def command(self, text: bytes) -> Transition:
        super().command(text)
        return self.command


class AsyncTalk(reqtable.AsyncRequestHandler):
    timeout: float | None = None

    async def handle(self) -> None:
        lines = 0
        try:
            while (text := await self.read(line(limit=200), timeout=self.timeout)).endswith(b"\n"):
                lines += 1
                if text == b"big\n":
                    await self.send(BIG)
                elif text == b"boom\n":
                    await self.send(b"so far\n")
                    raise ValueError("boom")
                else:
                    await self.send(text)
            await self.send(b"bye after %d: %s\n" % (lines, text))
        except TimeoutError:
            await self.send(b"too slow after %d\n" % lines)


class HastyAsyncTalk(AsyncTalk):
    timeout = SHORT_S


class BlockingTalk(reqtable.StreamRequestHandler):
    def handle(self) -> None:
        lines = 0
        try:
            while (text := self.rfile.readline(201)).endswith(b"\n"):
                lines += 1
                if text == b"big\n":
                    self.wfile.write(BIG)
                elif text == b"boom\n":
                    self.wfile.write(b"so far\n")
                    raise ValueError("boom")
                else:
                    self.wfile.write(text)
            self.wfile.write(b"bye after %d: %s\n" % (lines, text))
        except TimeoutError:
            self.wfile.write(b"too slow after %d\n" % lines)


class HastyBlockingTalk(BlockingTalk):
    timeout = SHORT_S


PIECES = 60  # datagrams of the long answer: as many as a socket buffer holds


class StateGrams(reqtable.StateRequestHandler):
    """A session: answers each datagram; `part …` gathers until `end`."""

    gathered: bytes = b""

    @state(datagram(), timeout=WAIT_S)
    def command(self, data: bytes) -> Transition:
        if data == b"big":
            for number in range(PIECES):
                self.send(b"%d " % number * 100)
            return None
        if data == b"boom":
            self.send(b"so far")
            raise ValueError("boom")
        if data == b"wait":
            self.send(b"waiting")
            return self.awaited
        if data.startswith(b"part "):
            self.gathered += data[5:]
            return self.command
        self.send((self.gathered + data).upper())
        return None

    @state(datagram(), timeout=SHORT_S)
    def awaited(self, data: bytes) -> Transition:
        self.send(b"came: " + data)

    def on_timeout(self) -> Transition:
        self.send(b"too slow")


class AsyncGrams(reqtable.AsyncRequestHandler):
    async def handle(self) -> None:
        gathered = b""
        while (data := await self.read(datagram(), timeout=WAIT_S)).startswith(b"part "):
            gathered += data[5:]
        if data == b"big":
            for number in range(PIECES):
                await self.send(b"%d " % number * 100)
        elif data == b"boom":
            await self.send(b"so far")
            raise ValueError("boom")
        elif data == b"wait":
            await self.send(b"waiting")
            try:
                await self.send(b"came: " + await self.read(datagram(), timeout=SHORT_S))
            except TimeoutError:
                await self.send(b"too slow")
        else:
            await self.send((gathered + data).upper())


class BlockingGrams(reqtable.BaseRequestHandler):
    """One datagram a request: the blocking classes know no sessions."""

    def handle(self) -> None:
        data, own = self.request
        if data == b"big":
            for number in range(PIECES):
                own.sendto(b"%d " % number * 100, self.client_address)
        elif data == b"boom":
            own.sendto(b"so far", self.client_address)
            raise ValueError("boom")
        else:
            own.sendto(data.upper(), self.client_address)
