"""The protocols of the examples as coroutines, so that the simulation runs each protocol in every resumable style."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from examples.miniredis import ARGUMENTS_MAX, BULK_BYTES_MAX, COMMANDS, CommandError, MiniRedis, Store
from examples.notes import slow_rank
from examples.tftp import ACK, BLOCK_BYTES, DATA, DENIED, ERROR, ILLEGAL, NOT_FOUND, READ, WRITE, Tftp
from reqtable import (
    AsyncRequestHandler,
    IncompleteRead,
    LimitExceeded,
    StateRequestHandler,
    StreamRequestHandler,
    Transition,
    datagram,
    exactly,
    flushed,
    line,
    state,
)


class AsyncNotes(AsyncRequestHandler):
    """Serves the protocol of `examples.notes.Notes`."""

    async def handle(self) -> None:
        words = 0
        try:
            while True:
                text = await self.read(line(limit=512), timeout=30)
                if not text.endswith(b"\n"):
                    return
                verb, _, rest = text.strip().partition(b" ")
                if verb == b"put" and rest.isdigit():
                    words += len((await self.read(exactly(int(rest)), timeout=60)).split())
                elif verb == b"count":
                    await self.send(b"%d\n" % words)
                elif verb == b"rank":
                    await self.send(b"rank %d\n" % await self.call(slow_rank, words))
                elif verb == b"bye":
                    return
                else:
                    await self.send(b"put N, count, rank or bye?\n")
        except (IncompleteRead, TimeoutError):
            return


class BlockingNotes(StreamRequestHandler):
    """Serves the protocol of `examples.notes.Notes` as a blocking handler, for policy `greenlet`."""

    timeout = 30

    def handle(self) -> None:
        words = 0
        for text in self.rfile:
            verb, _, rest = text.strip().partition(b" ")
            if verb == b"put" and rest.isdigit():
                words += len(self.rfile.read(int(rest)).split())
            elif verb == b"count":
                self.wfile.write(b"%d\n" % words)
            elif verb == b"rank":
                self.wfile.write(b"rank %d\n" % slow_rank(words))
            elif verb == b"bye":
                return
            else:
                self.wfile.write(b"put N, count, rank or bye?\n")


class AsyncRedis(AsyncRequestHandler):
    """Serves the protocol of `examples.miniredis.MiniRedis`, whose commands it uses."""

    store: ClassVar[Store]
    channels: ClassVar[dict[bytes, None]] = {}  # it knows no subscribers
    string, items, kill = MiniRedis.string, MiniRedis.items, MiniRedis.kill

    async def handle(self) -> None:
        try:
            while True:
                arguments = await self._command()
                if arguments is None or (arguments and not await self._execute(arguments)):
                    return
        except LimitExceeded:
            await self._refuse(b"too big inline request")
        except IncompleteRead:
            return

    async def _command(self) -> list[bytes] | None:
        text = await self.read(line())
        if not text.endswith(b"\n"):
            return None
        if text[:1] != b"*":
            return text.split()
        count = text[1:].strip()
        if not count.isdigit() or int(count) > ARGUMENTS_MAX:
            await self._refuse(b"invalid multibulk length")
            return None
        arguments = []
        for _ in range(int(count)):
            text = await self.read(line())
            size = text[1:].strip()
            if text[:1] != b"$" or not size.isdigit() or int(size) > BULK_BYTES_MAX:
                await self._refuse(b"invalid bulk length")
                return None
            arguments.append((await self.read(exactly(int(size) + 2)))[:-2])
        return arguments

    async def _refuse(self, why: bytes) -> None:
        await self.send(b"-ERR Protocol error: %b\r\n" % why)

    async def _execute(self, arguments: list[bytes]) -> bool:
        name = arguments[0].upper()
        method = COMMANDS.get(name)
        try:
            if method is None:
                raise CommandError(f"unknown command '{name.decode('ascii', 'replace')}'")
            least, most, run = method
            if not least <= len(arguments) - 1 <= most:
                raise CommandError(f"wrong number of arguments for '{name.decode().lower()}' command")
            answer = run(self, *arguments[1:])  # type: ignore[arg-type]
        except CommandError as error:
            text = str(error)
            answer = f"-{text if text.startswith('WRONGTYPE') else 'ERR ' + text}\r\n".encode()
        await self.send(b"+OK\r\n" if answer is None else answer)
        return answer is not None


class AsyncTftp(AsyncRequestHandler):
    """Serves the protocol of `examples.tftp.Tftp`."""

    root: ClassVar[Path]

    async def handle(self) -> None:
        packet = await self.read(datagram(), timeout=5)
        opcode, names = packet[:2], packet[2:].split(b"\0")
        if opcode == struct.pack("!H", WRITE):
            return await self._fail(DENIED, "this server is read-only")
        if opcode != struct.pack("!H", READ):
            return await self._fail(ILLEGAL, "a transfer begins with a read request")
        if len(names) < 3 or names[1].lower() not in (b"octet", b"netascii"):
            return await self._fail(ILLEGAL, "a read request is a name and a mode")
        root = self.root.resolve()
        path = (root / names[0].decode("utf-8", "replace").lstrip("/")).resolve()
        if not path.is_relative_to(root) or not path.is_file():
            return await self._fail(NOT_FOUND, "there is no such file")
        data = path.read_bytes()
        for block in range(1, len(data) // BLOCK_BYTES + 2):
            if not await self._transfer(block, data[(block - 1) * BLOCK_BYTES : block * BLOCK_BYTES]):
                return None
        return None

    async def _transfer(self, block: int, data: bytes) -> bool:
        for _ in range(Tftp.resends_max + 1):
            await self.send(struct.pack("!HH", DATA, block & 0xFFFF) + data)
            try:
                while True:
                    packet = await self.read(datagram(), timeout=1.0)
                    if packet[:2] == struct.pack("!H", ERROR):
                        return False
                    if packet[:4] == struct.pack("!HH", ACK, block & 0xFFFF):
                        return True
            except TimeoutError:
                pass
        return False

    async def _fail(self, code: int, message: str) -> None:
        await self.send(struct.pack("!HH", ERROR, code) + message.encode() + b"\0")


class AsyncChat(AsyncRequestHandler):
    """Serves the protocol of `examples.chat.Chat`."""

    name: str = ""

    async def handle(self) -> None:
        await self.send(b"your name? ")
        try:
            while not self.name:
                text = await self.read(line(limit=64), timeout=60)
                if not text.endswith(b"\n"):
                    return
                name = text.strip().decode("utf-8", "replace")
                if not name or name in [other.name for other in self.room()]:
                    await self.send(b"that name is taken. your name? ")
                else:
                    self.name = name
            self.tell_others(f"* {self.name} has joined")
            while (text := await self.read(line(limit=1024), timeout=3600)).endswith(b"\n"):
                said = text.strip().decode("utf-8", "replace")
                if said == "/quit":
                    return
                if said == "/who":
                    await self.send(", ".join(sorted(other.name for other in self.room())).encode() + b"\n")
                elif said:
                    self.tell_others(f"{self.name}: {said}")
        except TimeoutError:
            return

    def on_close(self) -> None:
        if self.name:
            self.tell_others(f"* {self.name} has left")

    def room(self) -> Iterator[AsyncChat]:
        for entry in self.server.table:
            if isinstance(entry.handler, AsyncChat) and entry.handler.name:
                yield entry.handler

    def tell_others(self, text: str) -> None:
        for other in self.room():
            if other is not self:
                other.send(text.encode() + b"\n")


def blob(count: int) -> bytes:
    """Return `count` bytes with a pattern that shows if bytes are lost, repeated or moved."""
    return (_PATTERN * (count // len(_PATTERN) + 1))[:count]


_PATTERN = b"".join(b"%06d\n" % number for number in range(1500))


class Blobs(StateRequestHandler):
    """Answers `mem N` with N bytes from memory, and `file N` with N bytes from a file."""

    path: ClassVar[str]

    def start(self) -> Transition:
        self._file = open(self.path, "rb")  # noqa: SIM115
        return self.ask

    def on_close(self) -> None:
        self._file.close()

    @state(line(limit=100), timeout=300)
    def ask(self, text: bytes) -> Transition:
        verb, count = text.split()
        if verb == b"mem":
            self.send(blob(int(count)))
        else:
            self.send_file(self._file, 0, int(count))
        return self.ask


class AsyncBlobs(AsyncRequestHandler):
    """Does the same as `Blobs`, in small sends that wait while the peer does not read."""

    path: ClassVar[str]

    async def handle(self) -> None:
        with open(self.path, "rb") as file:
            while text := await self.read(line(limit=100), timeout=300):
                verb, count = text.split()
                if verb == b"mem":
                    data = blob(int(count))
                    for begin in range(0, len(data), 5000):
                        await self.send(data[begin : begin + 5000])
                else:
                    self.send_file(file, 0, int(count))
                    await self.read(flushed())
