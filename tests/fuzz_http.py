"""The HTTP part of `make fuzz`: heads, bodies in chunks, and a handler that sends what its client chose."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote_to_bytes

from reqtable.http import HTTPRequestHandler
from reqtable.table.errors import HandlerError


class Answers(HTTPRequestHandler):
    """Echoes bodies. Refuses some by their head, and has a header field that the client chose."""

    body_bytes_max = 50_000

    def on_head(self) -> Any:
        return self.answer(403) if "early" in self.request.path else None

    def do_GET(self) -> Any:
        try:
            return self.answer(200, "x", {"X-Query": unquote_to_bytes(self.request.query).decode("latin-1")})
        except HandlerError:
            return self.answer(400)

    def do_POST(self) -> Any:
        return self.answer(200, self.request.body)


LINES = [b"GET /?%s HTTP/1.1", b"POST /%s HTTP/1.1", b"POST /early%s HTTP/1.1", b"GET http://y/%s HTTP/1.0", b"%s"]
ODD = [b"", b"a", b"%0d%0aX: y", b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b"\xff", b"#", b"a" * 9000]
FIELDS = [
    b"Host: x",
    b"Host: %s",
    b"Content-Length: %d",
    b"Content-Length: +%d",
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: gzip, chunked",
    b"Connection: close",
    b"Connection: keep-alive, %s",
    b"Expect: 100-continue",
    b"X%s: y",
    b"X: %s",
    b" folded",
    b"Content_Length: 3",
]
SIZES = [b"%x", b"%X;a=b", b'%x;a="b;c"', b"0%x", b"%x ", b"-%x", b"0x%x", b"%x;%%s"]
HEAD = b"POST /%s HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


def heads(rng: random.Random) -> Iterator[Any]:
    """Heads of lines that fit together, or not, cut into pieces."""
    data = b""
    for _ in range(rng.randint(1, 4)):
        lines = [_filled(rng, rng.choice(LINES)), *[b"Host: x"] * rng.choice([0, 1, 1, 1])]
        lines += [_filled(rng, rng.choice(FIELDS)) for _ in range(rng.randint(0, 5))]
        data += rng.choice([b"\r\n", b"\r\n", b"\r\n", b"\n"]).join(lines) + rng.choice([b"\r\n\r\n", b"\n\n", b"\r\n"])
        data += rng.choice([b"", bytes(rng.choice([1, 10, 300]))])
    yield from _cut(rng, data)


def chunks(rng: random.Random) -> Iterator[Any]:
    """Bodies in chunks, of which some are not what their sizes say."""
    data = b""
    for _ in range(rng.randint(1, 3)):
        data += HEAD % rng.choice([b"", b"early"])
        for _ in range(rng.randint(0, 6)):
            size = rng.choice([1, 2, 15, 16, 1000, 30_000])
            data += rng.choice([b"%x", b"%x", b"%x", rng.choice(SIZES)]) % size
            data += b"\r\n" + bytes(size + rng.choice([0] * 10 + [-1, 1])) + rng.choice([b"\r\n"] * 9 + [b"\n"])
        data += rng.choice(
            [b"0\r\n\r\n", b"0\r\n\r\n", b"0\r\nT: u\r\n\r\n", b"0\r\nHost: y\r\n\r\n", b"", b"ffffffffff\r\n"]
        )
    yield from _cut(rng, data)


def _filled(rng: random.Random, text: bytes) -> bytes:
    if b"%s" in text:
        return text.replace(b"%s", rng.choice(ODD))
    return text.replace(b"%d", b"%d" % rng.choice([0, 1, 5, 300, 10**20]))


def _cut(rng: random.Random, data: bytes) -> Iterator[Any]:
    for _ in range(rng.choice([0, 0, 0, 1, 3])):
        if data:
            at = rng.randrange(len(data))
            data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    step = rng.choice([len(data) or 1, 1 + len(data) // 40, 1 + len(data) // 3])
    for start in range(0, len(data), step):
        yield data[start : start + step]
        if rng.random() < 0.1:
            yield rng.choice([10, 10_000])
