"""The clients: each holds a conversation of its own, knows every byte that must come, and tells its tally."""

from __future__ import annotations

import asyncio
import os
import random
import zlib
from dataclasses import dataclass, field
from typing import Any

from tests.moving.tally import WAIT_S, Closed, Tally, Wrong
from tests.moving.versions import PIECE_BYTES

AFTER_FAILURE_S = 0.1
PAUSE_S = 0.02  # on average, between requests
PART_S = 0.02  # the same, between two parts of a line
HOST = "127.0.0.1"


@dataclass
class Shared:
    """Holds what the clients of one kind share."""

    port: int
    over: asyncio.Event
    connecting: asyncio.Semaphore  # so many at a time: the kernel's queue is bounded
    tally: Tally = field(default_factory=Tally)
    options: dict[str, Any] = field(default_factory=dict)


class Client:
    """Converses until the load is over. After a failure, which is counted, it begins another conversation."""

    def __init__(self, shared: Shared, name: str, seed: int) -> None:
        self.shared = shared
        self.name = name
        self.random = random.Random(f"{seed} {name}")
        self.has_begun = asyncio.Event()  # set after the first answer
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter | None = None

    def __str__(self) -> str:
        return self.name

    async def run(self) -> None:
        while not self.shared.over.is_set():
            try:
                await self.converse()
            except Closed:
                pass
            except asyncio.CancelledError:
                self.shared.tally.fail(self, TimeoutError("did not end"))
                return
            except Exception as error:  # a mistake of this program, too, is a failure
                self.shared.tally.fail(self, error)
                await asyncio.sleep(AFTER_FAILURE_S)
            finally:
                if self.writer is not None:
                    self.writer.transport.abort()
                    self.writer = None

    async def converse(self) -> None:
        raise NotImplementedError

    # -- for conversations --------------------------------------------------------------------------------------------

    def request(self) -> Any:
        return self.shared.tally.request(self)

    async def connect(self) -> None:
        async with self.shared.connecting, asyncio.timeout(WAIT_S):
            self.reader, self.writer = await asyncio.open_connection(HOST, self.shared.port)

    async def send(self, data: bytes) -> None:
        assert self.writer is not None
        self.writer.write(data)
        async with asyncio.timeout(WAIT_S):
            await self.writer.drain()

    async def send_in_parts(self, data: bytes) -> None:
        """Send, as often as not, in up to three parts with pauses, so that the server has a part of a line."""
        cuts = sorted(self.random.randrange(len(data) + 1) for _ in range(self.random.choice((0, 0, 1, 2))))
        for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            await self.send(data[start:end])
            if end < len(data):
                await self.pause(PART_S)

    async def line(self) -> bytes:
        async with asyncio.timeout(WAIT_S):
            text = await self.reader.readline()
        if not text:
            raise EOFError("the end, where a line should be")
        if not text.endswith(b"\n"):
            raise EOFError(f"the end, after {text!r}")
        self.shared.tally.progress(self)
        return text

    async def exactly(self, count: int) -> bytes:
        async with asyncio.timeout(WAIT_S):
            data = await self.reader.readexactly(count)
        self.shared.tally.progress(self)
        return data

    async def end_of_file(self) -> None:
        async with asyncio.timeout(WAIT_S):
            self.expect(await self.reader.read(64), b"")

    async def pause(self, mean_s: float | None = None) -> None:
        """Wait a random time, or until the load is over."""
        mean_s = self.shared.options.get("pause_s", PAUSE_S) if mean_s is None else mean_s
        try:
            async with asyncio.timeout(self.random.random() * 2 * mean_s):
                await self.shared.over.wait()
        except TimeoutError:
            pass

    def expect(self, came: bytes, wanted: bytes) -> None:
        if came != wanted:
            raise Wrong(f"{came[:200]!r} came instead of {wanted[:200]!r}")

    def is_done(self) -> bool:
        self.has_begun.set()
        return self.shared.over.is_set()


# -- lines, to Ledger -------------------------------------------------------------------------------------------------


class LineClient(Client):
    """Knows what Ledger must answer."""

    count = total = version = 0
    last: tuple[int, ...] = ()

    async def connect(self) -> None:
        await super().connect()
        self.count = self.total = self.version = 0
        self.last = ()

    async def check(self, number: int) -> None:
        """Take an answer. The version of the server never goes back."""
        self.count += 1
        self.total += number
        self.last = (*self.last, number)[-8:]
        came = await self.line()
        head, _, version = came.strip().rpartition(b" ")
        shown = ",".join(map(str, self.last))
        self.expect(head, f"{self.count} {self.total} {shown}".encode())
        if not version.isdigit() or int(version) < self.version:
            raise Wrong(f"version {version!r} came after {self.version}")
        self.version = self.shared.tally.versions[self] = int(version)


class Talker(LineClient):
    """Keeps one connection, with a line at a time."""

    async def converse(self) -> None:
        with self.request():
            await self.connect()
        while True:
            number = self.random.randrange(1_000_000)
            with self.request():
                if self.random.random() < 0.1:
                    await self.send_in_parts(b"rest %d\n" % self.random.randrange(100))
                    await self.check(0)
                elif self.random.random() < 0.1:
                    data = self.random.randbytes(self.random.randrange(1, 300))
                    await self.send_in_parts(b"take %d\n%b" % (len(data), data))
                    await self.check(zlib.crc32(data))
                else:
                    await self.send_in_parts(b"add %d\n" % number)
                    await self.check(number)
            if self.is_done():
                return
            await self.pause()


class Pinger(LineClient):
    """Keeps one connection, and sends whole lines: how long an answer takes is a matter of the server alone."""

    async def converse(self) -> None:
        with self.request():
            await self.connect()
        while True:
            number = self.random.randrange(1000)
            with self.request():
                await self.send(b"add %d\n" % number)
                await self.check(number)
            if self.is_done():
                return
            await self.pause()


class HalfDone(LineClient):
    """Has sent a part of a line, and sends the rest when the load is over."""

    async def converse(self) -> None:
        number = self.random.randrange(1_000_000)
        with self.request():
            await self.connect()
            await self.send(b"add %d\nadd %d" % (number, number))
            await self.check(number)
        self.has_begun.set()
        await self.shared.over.wait()
        with self.request():
            await self.send(b"7\n")
            await self.check(number * 10 + 7)


class Churner(LineClient):
    """Makes one connection after another, each with one request."""

    async def converse(self) -> None:
        while True:
            with self.request():
                await self.connect()
                number = self.random.randrange(1000)
                await self.send(b"once %d\n" % number)
                await self.check(number)
                await self.end_of_file()
            assert self.writer is not None
            self.writer.close()
            if self.is_done():
                return
            await self.pause()


class Pipeliner(LineClient):
    """Sends many lines before it reads an answer. Each such batch is counted as one request."""

    async def converse(self) -> None:
        with self.request():
            await self.connect()
        while True:
            numbers = [self.random.randrange(1000) for _ in range(self.random.randrange(1, 65))]
            with self.request():
                await self.send_in_parts(b"".join(b"add %d\n" % number for number in numbers))
                for number in numbers:
                    await self.check(number)
            if self.is_done():
                return
            await self.pause()


class Uploader(LineClient):
    """Uploads slowly, in pieces."""

    async def converse(self) -> None:
        with self.request():
            await self.connect()
        while True:
            crc, pieces = 0, self.random.randrange(20, 80)
            with self.request():
                await self.send(b"take %d\n" % (pieces * 5000))
                for _ in range(pieces):
                    data = self.random.randbytes(5000)
                    crc = zlib.crc32(data, crc)
                    await self.send(data)
                    self.shared.tally.progress(self)
                    await self.pause()
                await self.check(crc)
            if self.is_done():
                return


class Downloader(LineClient):
    """Downloads slowly, in pieces."""

    async def converse(self) -> None:
        with self.request():
            await self.connect()
        while True:
            seed, pieces = self.random.randrange(1000), self.random.randrange(20, 80)
            with self.request():
                await self.send(b"give %d %d\n" % (pieces, seed))
                for left in reversed(range(pieces)):
                    self.expect(await self.exactly(PIECE_BYTES), (b"%d.%d." % (seed, left) * PIECE_BYTES)[:PIECE_BYTES])
                    await self.pause()
                await self.check(seed)
            if self.is_done():
                return


# -- HTTP -------------------------------------------------------------------------------------------------------------


class HttpClient(Client):
    """Asks by HTTP/1.1."""

    is_kept = True

    async def ask(self, request: bytes, is_first: bool) -> int:
        """Send a request. Returns the length of the answer's body.

        Raises Closed if the server has closed a kept connection before anything of the request was sent: a client then
        takes another one.
        """
        if not is_first and (self.reader.at_eof() or self.reader.exception() is not None):
            raise Closed
        await self.send(request)
        self.expect((await self.line()).partition(b" ")[2][:3], b"200")
        length, self.is_kept = 0, True
        while name_value := (await self.line()).strip().lower():
            name, _, value = name_value.partition(b":")
            if name == b"content-length":
                length = int(value)
            if name == b"connection" and value.strip() == b"close":
                self.is_kept = False
        return length

    async def echo(self, is_first: bool, how: bytes = b"") -> None:
        number = b"%d" % self.random.randrange(1_000_000)
        length = await self.ask(b"GET /echo/%b HTTP/1.1\r\nHost: a\r\n%b\r\n" % (number, how), is_first)
        self.expect(await self.exactly(length), number)


class HttpTalker(HttpClient):
    """Keeps its connection, with one request after another, until the server says that it closes it."""

    async def converse(self) -> None:
        with self.request():
            await self.connect()
            await self.echo(is_first=True)
        while not self.is_done() and self.is_kept:
            await self.pause()
            with self.request():
                await self.echo(is_first=False)


class HttpChurner(HttpClient):
    """Makes one connection after another, each with one request."""

    async def converse(self) -> None:
        with self.request():
            await self.connect()
            await self.echo(is_first=True, how=b"Connection: close\r\n")
            await self.end_of_file()
        if not self.is_done():
            await self.pause()


class HttpDownloader(HttpClient):
    """Downloads slowly, with a connection for each download."""

    pieces = 40

    async def converse(self) -> None:
        with self.request():
            await self.connect()
            path = self.shared.options.get("path", f"/give/{self.pieces}").encode()
            length = await self.ask(b"GET %b HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" % path, is_first=True)
            self.expect(b"%d" % length, b"%d" % (self.pieces * PIECE_BYTES))
            for left in reversed(range(self.pieces)):
                self.expect(await self.exactly(PIECE_BYTES), (b"%d." % left * PIECE_BYTES)[:PIECE_BYTES])
                await self.pause()
        self.is_done()


class HttpUploader(HttpClient):
    """Uploads `size` bytes in one request, at `rate` bytes a second if that is set."""

    async def converse(self) -> None:
        size, rate = self.shared.options.get("size", 400_000), self.shared.options.get("rate", 500_000)
        piece, crc, left = self.random.randbytes(min(size, 65_536)), 0, size
        clock = asyncio.get_running_loop()
        with self.request():
            await self.connect()
            self.has_begun.set()
            await self.send(b"POST /take HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n" % size)
            began = clock.time()
            await self.send(b"Connection: close\r\n\r\n")
            while left:
                data = piece[:left]
                crc, left = zlib.crc32(data, crc), left - len(data)
                await self.send(data)
                self.shared.tally.progress(self)
                await asyncio.sleep(max(0.0, began + (size - left) / rate - clock.time()))
            # an answer that has not come yet has no head: what follows reads it
            self.expect((await self.line()).partition(b" ")[2][:3], b"200")
            while (await self.line()).strip():
                pass
            self.expect(await self.exactly(len(b"%d %d" % (size, crc))), b"%d %d" % (size, crc))
        if not self.is_done() and self.shared.options.get("once"):
            await self.shared.over.wait()


# -- WebSockets -------------------------------------------------------------------------------------------------------


class WebSocketClient(Client):
    """Keeps a WebSocket open, and sends a short text now and then. The server counts the messages."""

    async def converse(self) -> None:
        with self.request():
            await self.connect()
            await self.send(
                b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
            )
            self.expect((await self.line()).partition(b" ")[2][:3], b"101")
            while (await self.line()).strip():
                pass
        count = 0
        while True:
            text = b"%d" % self.random.randrange(1000)
            with self.request():
                count += 1
                mask = os.urandom(4)
                masked = bytes(byte ^ mask[place % 4] for place, byte in enumerate(text))
                await self.send_in_parts(b"\x81" + bytes([0x80 | len(text)]) + mask + masked)
                head = await self.exactly(2)
                wanted = b"%d %b" % (count, text)
                self.expect(head + await self.exactly(head[1] & 0x7F), b"\x81" + bytes([len(wanted)]) + wanted)
            if self.is_done():
                return
            await self.pause()


KINDS: dict[str, type[Client]] = {
    "talk": Talker,
    "ping": Pinger,
    "half": HalfDone,
    "churn": Churner,
    "pipeline": Pipeliner,
    "upload": Uploader,
    "download": Downloader,
    "http-talk": HttpTalker,
    "http-churn": HttpChurner,
    "http-download": HttpDownloader,
    "http-upload": HttpUploader,
    "websocket": WebSocketClient,
}
