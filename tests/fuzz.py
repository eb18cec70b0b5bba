"""Bytes that no client should send, to a server that must not mind: `python -m tests.fuzz --seeds 10000`.

Each seed is one connection to one of the targets: what it sends comes from one of the target's generators, in pieces,
with reading, half-closing and resetting in between. Then an honest client must get its answer, the table must be empty,
and nothing may have been logged as a bug. Descriptors and memory must be level in the end. All in one thread, over
socket pairs, by a fake clock: a seed does the same wherever it runs.

Another kind of input is one more generator, a function of a `random.Random` that yields what to do; another kind of
server is one more `Target`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import random
import socket
import ssl
import sys
import tempfile
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import reqtable
from reqtable import Config, Limits, chunk, exactly, line, rest, state, until
from reqtable.config import ProxyOptions, TLSOptions
from reqtable.loop.platform import System
from reqtable.net.sockets import is_peers_doing
from reqtable.testing import FakeClock
from tests import fuzz_http, fuzz_websockets
from tests.certificates import client_context, write_certificate

PEER = ("198.51.100.7", 5000)
ANSWER_BYTES_MAX = 300_000
LIMITS = Limits(high_water_bytes=4096, input_bytes_max=100_000, recv_bytes=20_000, buffered_bytes_max=500_000)
PASSES_MAX = 300
LEVEL_BYTES = 16 * 2**20


# -- the handlers -----------------------------------------------------------------------------------------------------
# A line says what is to come: `exactly N`, `until X`, `chunk N`, `rest`, `big N` (asks for N bytes). Others are echoed.


def parsed(text: bytes) -> tuple[bytes, int]:
    """A verb, and its count; a count that is none is 1."""
    verb, _, number = text.strip().partition(b" ")
    return verb, int(number) if number.isdigit() and number != b"0" * len(number) else 1


def want_of(text: bytes) -> Any:
    """What that line says is to come, or None."""
    verb, count = parsed(text)
    if verb == b"until":
        return until(text[6:].strip() or b"x", limit=2000)
    return {b"exactly": exactly(count), b"chunk": chunk(min(count, 5000)), b"rest": rest(3000)}.get(verb)


def answer_to(text: bytes) -> bytes:
    verb, count = parsed(text)
    return bytes(min(count, ANSWER_BYTES_MAX)) if verb == b"big" else text


class States(reqtable.StateRequestHandler):
    @state(line(limit=1000))
    def command(self, text: bytes) -> Any:
        want = want_of(text)
        if want is not None:
            return self.body, want
        self.send(answer_to(text))
        return self.command

    @state()
    def body(self, data: bytes) -> Any:
        self.send(b"%d\n" % len(data))
        return self.command


class Coroutine(reqtable.AsyncRequestHandler):
    async def handle(self) -> None:
        while text := await self.read(line(limit=1000)):
            want = want_of(text)
            if want is not None:
                await self.send(b"%d\n" % len(await self.read(want)))
            else:
                await self.send(answer_to(text))


class Blocking(reqtable.StreamRequestHandler):
    def handle(self) -> None:
        while text := self.rfile.readline(1000):
            verb, count = parsed(text)
            if verb in (b"exactly", b"chunk"):
                self.wfile.write(b"%d\n" % len(self.rfile.read(min(count, 50_000))))
            elif verb == b"rest":
                self.wfile.write(b"%d\n" % len(self.rfile.read()))
            else:
                self.wfile.write(answer_to(text))


class BlockingInline(Blocking):
    timeout = 0.001  # nobody else runs meanwhile, its client included


# -- what is sent -----------------------------------------------------------------------------------------------------

# Bytes are sent; a number of bytes is read, as far as they have come; END half-closes; RESET and CLOSE end it.
END, RESET, CLOSE = "end", "reset", "close"
Action = bytes | int | str | Callable[[socket.socket], None]  # a function does what it does with the client's socket
Generator = Callable[[random.Random], Iterator[Action]]


def random_bytes(rng: random.Random) -> Iterator[Action]:
    for _ in range(rng.randint(1, 5)):
        yield rng.randbytes(rng.choice([0, 1, 10, 1000, 30_000]))


def oversized_lines(rng: random.Random) -> Iterator[Action]:
    for _ in range(rng.randint(1, 4)):
        yield rng.choice([b"x", b"\r", b"exactly ", b"\0"]) * rng.choice([100, 999, 1000, 1001, 50_000])
        yield rng.choice([b"", b"\n", b"\r\n"])


def counts_of_the_peers_choice(rng: random.Random) -> Iterator[Action]:
    counts = [0, 1, 2, 100, 20_000, 99_999, 100_000, 100_001, 2**31, 2**63, 10**30]
    for _ in range(rng.randint(1, 5)):
        verb = rng.choice([b"exactly", b"chunk", b"rest", b"until", b"big"])
        yield verb + rng.choice([b" ", b"  ", b"\t", b" -", b" +"]) + b"%d\n" % rng.choice(counts)
        yield rng.randbytes(rng.choice([0, 1, 100, 20_000]))


def deep_pipelining(rng: random.Random) -> Iterator[Action]:
    line_of_it = rng.choice([b"\n", b"a\n", b"big 2000\n", b"chunk 1\nx", b"exactly 3\nabc"])
    yield line_of_it * rng.choice([100, 1000, 5000])
    yield rng.choice([0, 10_000])


def reset_in_mid_answer(rng: random.Random) -> Iterator[Action]:
    yield b"big %d\n" % rng.choice([10_000, 100_000, ANSWER_BYTES_MAX])
    yield rng.choice([0, 1, 5000])
    yield rng.choice([b"", b"a\n", b"exactly 500\n"])
    yield RESET


def dribble(rng: random.Random) -> Iterator[Action]:
    text = b"".join(bytes(each) for each in counts_of_the_peers_choice(rng) if isinstance(each, bytes))
    for number in range(min(len(text), 60)):
        yield text[number : number + 1]
    yield rng.choice([b"", END])


PLAIN: list[Generator] = [
    random_bytes,
    oversized_lines,
    counts_of_the_peers_choice,
    deep_pipelining,
    reset_in_mid_answer,
    dribble,
]


def proxy_headers(rng: random.Random) -> Iterator[Action]:
    """Headers of both versions, cut off, with bytes that are others, or with more after them."""
    ipv4 = b"\x11\x00\x0c" + bytes([192, 0, 2, 1, 192, 0, 2, 2]) + b"\x10\x00\x20\x00"
    headers = [b"PROXY TCP4 192.0.2.1 192.0.2.2 4000 80\r\n", b"PROXY UNKNOWN\r\n", b"PROXY TCP6 ::1 ::1 1 2\r\n"]
    headers += [b"\r\n\r\n\0\r\nQUIT\n" + b"\x21" + ipv4, b"\r\n\r\n\0\r\nQUIT\n" + b"\x20\x00\x00\x00"]
    header = bytearray(rng.choice(headers))
    for _ in range(rng.choice([0, 0, 1, 3])):
        header[rng.randrange(len(header))] = rng.randrange(256)
    cut = rng.choice([len(header), rng.randrange(len(header) + 1)])
    pieces = rng.choice([1, 2, 60])
    for start in range(0, cut, max(1, cut // pieces)):
        yield bytes(header[start : min(cut, start + max(1, cut // pieces))])
    if rng.random() < 0.5:
        yield rng.choice([b"a\n", rng.randbytes(1000), b"x" * 50_000])


def tls(rng: random.Random) -> Iterator[Action]:
    """A client's side of TLS, in which something is cut off, is another byte, or is too much."""
    client = SecuredClient()
    spoiled_at = rng.randrange(4)
    rounds = rng.randint(1, 5)

    def go_on(number: int, own: socket.socket) -> None:
        client.take(own)
        with contextlib.suppress(ssl.SSLError):
            client.tls.do_handshake()
            client.tls.write(rng.choice([b"a\n", b"exactly 100\nx", b"big 100000\n", b"x" * 20_000]))
            client.tls.read(1000)
        own.send(spoil(client.goes.read(), rng) if number == spoiled_at else client.goes.read())

    for number in range(rounds):
        yield partial(go_on, number)


def spoil(data: bytes, rng: random.Random) -> bytes:
    spoiled = bytearray(data)
    for _ in range(rng.choice([0, 1, 1, 5])):
        if spoiled:
            spoiled[rng.randrange(len(spoiled))] = rng.randrange(256)
    if rng.random() < 0.5:
        del spoiled[rng.randrange(len(spoiled) + 1) :]
    return bytes(spoiled) + rng.choice([b"", b"", rng.randbytes(100), b"\x16\x03\x01\xff\xff" + bytes(60_000)])


# -- the servers ------------------------------------------------------------------------------------------------------


class Server(reqtable.TCPServer):
    """A server whose requests are offered to it by hand."""

    def __init__(self, handler: Any, dispatch: str, config: Config) -> None:
        super().__init__(("127.0.0.1", 0), handler, dispatch=dispatch, config=config)
        self.clock = FakeClock()
        reqtable.Engine(limits=config.limits, system=System(clock=self.clock)).add(self)
        self.engine.loop.open()
        self.offered: deque[socket.socket] = deque()
        self.bugs: list[str] = []

    def get_request(self) -> Any:
        return self.offered.popleft(), PEER

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if not is_peers_doing(error):
            self.bugs.append(f"handle_error: {error!r}")

    def offer(self, connection: socket.socket) -> None:
        self.offered.append(connection)
        self._handle_request_noblock()


@dataclass
class Target:
    """A kind of server, and what is sent to it."""

    name: str
    handler: Any
    dispatch: str = "inline"
    config: Config = field(default_factory=lambda: Config(limits=LIMITS))
    generators: list[Generator] = field(default_factory=lambda: PLAIN)
    honest: bytes = b"honest\n"  # is answered with its last line, unless there is an
    honest_answer: bytes | None = None
    has_head: bool = False  # something that can't be foreseen, such as a date, comes before the answer
    is_secured: bool = False
    never: bytes = b""  # what no answer may have in it
    fails_itself: bool = False  # its application fails, and that is logged

    def server(self) -> Server:
        return Server(self.handler, self.dispatch, self.config)

    @property
    def expected(self) -> bytes:
        """What an honest client gets."""
        return self.honest_answer or self.honest.splitlines(keepends=True)[-1]

    def is_right(self, got: bytes) -> bool:
        """Return whether `got` is the whole answer to an honest client."""
        return got.endswith(self.expected) if self.has_head else got == self.expected

    @property
    def runs_at_once(self) -> bool:
        """Its handler reads on the loop until its input ends: that must be there before it is."""
        return self.handler is BlockingInline


class SecuredClient:
    """A client's side of TLS, by hand."""

    def __init__(self) -> None:
        self._came, self.goes = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = client_context().wrap_bio(self._came, self.goes, server_hostname="127.0.0.1")
        self._has_sent = False

    def talk(self, own: socket.socket, text: bytes) -> bytes:
        """Go on: shake hands, then send the text, once. Returns what has come of the answer."""
        self.take(own)
        try:
            if not self._has_sent:
                self.tls.do_handshake()
                self.tls.write(text)
                self._has_sent = True
            return self.tls.read(1000)
        except ssl.SSLWantReadError:
            return b""
        finally:
            own.send(self.goes.read())

    def take(self, own: socket.socket) -> None:
        """Take what has come."""
        with contextlib.suppress(BlockingIOError):
            self._came.write(own.recv(100_000))


FOLDER = tempfile.TemporaryDirectory()
SECURED = Config(limits=LIMITS, tls=TLSOptions(cert=write_certificate(Path(FOLDER.name))))
PROXY = Config(limits=LIMITS, proxy=ProxyOptions(trusted=(PEER[0],)))
TARGETS = [
    Target("state", States),
    Target("async", Coroutine),
    Target("blocking, inline", BlockingInline),
    Target("blocking, greenlet", Blocking, "greenlet"),
    Target(
        "state, PROXY",
        States,
        config=PROXY,
        generators=[proxy_headers],
        honest=b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\na\n",
    ),
    Target("state, TLS", States, config=SECURED, generators=[tls, tls, random_bytes], is_secured=True),
    Target(
        "WebSocket",
        fuzz_websockets.Echo,
        generators=[fuzz_websockets.frames, fuzz_websockets.frames, fuzz_websockets.floods, fuzz_websockets.handshakes],
        honest=fuzz_websockets.HONEST,
        honest_answer=fuzz_websockets.HONEST_ANSWER,
    ),
    Target("blocking, greenlet, TLS", Blocking, "greenlet", SECURED, generators=[tls], is_secured=True),
    *[
        Target(
            f"HTTP {generator.__name__}",
            fuzz_http.Answers,
            generators=[generator],
            honest=b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 7\r\n\r\nhonest\n",
            honest_answer=b"\r\n\r\nhonest\n",
            has_head=True,
            never=fuzz_http.SPLIT,
        )
        for generator in (fuzz_http.heads, fuzz_http.chunks, fuzz_http.chosen)
    ],
    Target(
        "HTTP files",
        fuzz_http.files_below(Path(FOLDER.name)),
        generators=[fuzz_http.ranges],
        honest=b"GET /some.txt HTTP/1.1\r\nHost: x\r\nRange: bytes=65-67\r\n\r\n",
        honest_answer=b"\r\n\r\nABC",
        has_head=True,
        never=fuzz_http.SPLIT,
    ),
    Target(
        "WSGI",
        fuzz_http.WSGI,
        generators=[fuzz_http.chosen],
        honest=b"GET /?a HTTP/1.1\r\nHost: x\r\n\r\n",
        honest_answer=b"\r\n\r\nmoved",
        has_head=True,
        never=fuzz_http.SPLIT,
        fails_itself=True,  # a field that can't be sent is an error of the application
    ),
]


class Fuzz:
    """The servers, for as many seeds as there are."""

    def __init__(self) -> None:
        self.servers = [target.server() for target in TARGETS]
        self.endings: Counter[str] = Counter()
        self._got = bytearray()  # what the client of this seed has got
        self._log = Bugs()
        logger = logging.getLogger("reqtable")
        logger.addHandler(self._log)
        logger.propagate = False  # nobody else keeps the errors, and so the sockets in their tracebacks

    def close(self) -> None:
        logger = logging.getLogger("reqtable")
        logger.removeHandler(self._log)
        logger.propagate = True
        for server in self.servers:
            server.server_close()
            for ending, count in server.stats()["finished"].items():
                self.endings[ending] += count

    def run(self, seed: int) -> list[str]:
        """One connection, and an honest one. Returns what was wrong."""
        number = seed % len(TARGETS)
        target, server = TARGETS[number], self.servers[number]
        rng = random.Random(seed)
        generator = rng.choice(target.generators)
        actions = [*generator(rng), rng.choice([END, RESET, CLOSE]), CLOSE]
        problems = []
        try:
            self._got.clear()
            self._connect(server, actions, target.runs_at_once, rng)
            if target.never and target.never in self._got:
                problems.append(f"an answer has {target.never!r}: {bytes(self._got)[:500]!r}")
            if len(server.table) or server.table.buffered:
                problems.append(f"left over: {list(server.table)}, {server.table.buffered} bytes")
            got = self._honest(server, target)
            if not target.is_right(got):
                problems.append(f"an honest client got {got!r}")
        except Exception as error:
            problems.append(f"escaped: {error!r}")
            server.server_close()
            self.servers[number] = target.server()
        logged = [each for each in self._log.bugs if not (target.fails_itself and fuzz_http.FAILED in each)]
        problems += [*server.bugs, *logged]
        server.bugs.clear()
        self._log.bugs.clear()
        return [f"seed {seed}, {target.name}, {generator.__name__}: {problem}" for problem in problems]

    def _connect(self, server: Server, actions: list[Action], runs_at_once: bool, rng: random.Random) -> None:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        if not runs_at_once:
            server.offer(ours)
        for action in actions:
            if not runs_at_once and rng.random() < 0.7:
                server.engine.loop.run_once(0)
            self._do(server, theirs, action, runs_at_once)
        if runs_at_once:
            server.offer(ours)
        for number in range(PASSES_MAX):
            server.engine.loop.run_once(0)
            if not len(server.table):
                return
            if number == PASSES_MAX // 2:
                server.clock.jump(100)

    def _do(self, server: Server, client: socket.socket, action: Action, runs_at_once: bool) -> None:
        with contextlib.suppress(OSError):  # the server has ended it, or takes no more
            if isinstance(action, bytes):
                for start in range(0, len(action), 10_000):
                    client.send(action[start : start + 10_000])
                    if not runs_at_once:
                        server.engine.loop.run_once(0)
            elif isinstance(action, int):
                self._got += client.recv(action)
            elif action == END:
                client.shutdown(socket.SHUT_WR)
            elif callable(action):
                action(client)
            elif action == CLOSE:
                self._drain(client)
                client.close()
            else:  # a Unix socket that is closed with something unread resets its peer
                client.close()

    def _drain(self, client: socket.socket) -> None:
        """Receive what has come, which is little."""
        with contextlib.suppress(OSError):
            while more := client.recv(65_536):
                self._got += more

    def _honest(self, server: Server, target: Target) -> bytes:
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.setblocking(False)
            if not target.is_secured:
                theirs.send(target.honest)
            if target.runs_at_once:
                theirs.shutdown(socket.SHUT_WR)
            server.offer(ours)
            got = b""
            secured = SecuredClient() if target.is_secured else None
            for _ in range(PASSES_MAX):
                server.engine.loop.run_once(0)
                if secured is not None:
                    got += secured.talk(theirs, target.honest)
                else:
                    with contextlib.suppress(BlockingIOError):
                        got += theirs.recv(1000)
                if target.is_right(got):
                    break
        for _ in range(PASSES_MAX):
            server.engine.loop.run_once(0)
            if not len(server.table):
                break
        return got


class Bugs(logging.Handler):
    """What is logged as an error, or with a traceback."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.bugs: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR or record.exc_info:
            self.bugs.append(f"logged: {record.getMessage()}")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def fuzz(seeds: range) -> list[str]:
    """Run the seeds. Returns what was wrong, what is not level in the end included; prints what was done."""
    fuzzing = Fuzz()
    problems: list[str] = []
    warm = min(len(seeds) // 2, 2000)
    before, memory = descriptors(), resident()
    begun = time.monotonic()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", ResourceWarning)
        for number, seed in enumerate(seeds):
            if number == warm:
                memory = resident()
            problems += fuzzing.run(seed)
        gc.collect()
    problems += sorted({f"never closed: {str(each.message).partition(' ')[2]}" for each in warned})
    if descriptors() > before:
        problems.append(f"{descriptors() - before} descriptors more than before")
    grown = resident() - memory
    if grown > LEVEL_BYTES:
        problems.append(f"{grown / 2**20:.1f} MiB of memory more than after {warm} seeds")
    fuzzing.close()
    ended = ", ".join(f"{count} {ending}" for ending, count in fuzzing.endings.items() if count)
    took = time.monotonic() - begun
    print(f"{len(seeds)} seeds in {took:.1f} s, memory grew by {grown / 2**20:.1f} MiB; ended: {ended}")
    return problems


def main(fuzz: Callable[[range], list[str]], description: str | None) -> int:
    """Fuzz with the seeds of the command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    os.environ.setdefault("REQTABLE_DEBUG", "1")  # the invariants are checked after every pass
    problems = fuzz(range(given.first, given.first + given.seeds))
    print(*problems[:50], sep="\n", end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(fuzz, __doc__))
