"""The HTTP part of `make fuzz`: heads, bodies in chunks, ranges of files, and applications that send what they get."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from reqtable.http import FileRequestHandler, HTTPRequestHandler, wsgi_handler
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


def application(environ: Any, start_response: Any) -> list[bytes]:
    """Answer with a status and fields that the client chose: an application that checks nothing."""
    chosen = unquote_to_bytes(environ["QUERY_STRING"]).decode("latin-1")
    if chosen.startswith("s="):
        start_response(f"302 {chosen}", [("Content-Type", "text/plain")])
    else:
        start_response("302 Found", [("X-Query", chosen), ("Location", f"/{chosen}")])
    return [b"moved"]


WSGI = wsgi_handler(application, timeout_s=None)


def files_below(folder: Path) -> type[FileRequestHandler]:
    """Return a handler that serves a folder with a few files."""
    (folder / "some.txt").write_bytes(bytes(range(256)) * 4)
    (folder / "some.txt.gz").write_bytes(b"gz")
    (folder / "large.bin").write_bytes(bytes(60_000))
    (folder / "empty").write_bytes(b"")
    return type("Files", (FileRequestHandler,), {"root": str(folder), "lists_folders": False})


FAILED = ", in application ("  # the log names the failed line of the application so
SPLIT = b"\nSplit:"  # no answer has a field of that name, unless a client can make one
LINES = [b"GET /?%s HTTP/1.1", b"POST /%s HTTP/1.1", b"POST /early%s HTTP/1.1", b"GET http://y/%s HTTP/1.0", b"%s"]
ESCAPED = [b"%0d%0aSplit:%201", b"%0aSplit:%201", b"s=%0d%0aSplit:%201", b"%00", b"%ff", b"%0b", b"%7f"]
ODD = [*ESCAPED, b"", b"a", b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b"\xff", b"#", b"a" * 9000]
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
DATE = b"Sun, 06 Nov 1994 08:49:37 GMT"
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


def ranges(rng: random.Random) -> Iterator[Any]:
    """Requests for parts of files, with conditions."""
    data = b""
    for _ in range(rng.randint(1, 4)):
        path = rng.choice([b"/some.txt", b"/large.bin", b"/empty", b"/", b"/none", b"/some.txt/", b"/%2e%2e/x"])
        fields = [b"Host: x"]
        if rng.random() < 0.9:
            parts = [_range(rng) for _ in range(rng.choice([1, 1, 1, 2, 3, 40]))]
            fields.append(b"Range: " + rng.choice([b"bytes=", b"bytes=", b"bytes=", b"lines=", b""]) + b",".join(parts))
        for name in (b"If-Range", b"If-Match", b"If-None-Match", b"If-Modified-Since", b"Accept-Encoding"):
            if rng.random() < 0.2:
                fields.append(name + b": " + rng.choice([b"*", b'"x"', b'W/"x"', b"gzip", b"gzip;q=0", DATE, *ODD]))
        data += rng.choice([b"GET", b"GET", b"GET", b"HEAD", b"POST"]) + b" %b HTTP/1.1\r\n" % path
        data += b"\r\n".join(fields) + b"\r\n\r\n"
    yield from _cut(rng, data)


def _range(rng: random.Random) -> bytes:
    numbers = [
        b"0",
        b"1",
        b"500",
        b"1023",
        b"1024",
        b"59999",
        b"60000",
        b"9" * 18,
        b"9" * 19,
        b"9" * 40,
        b"",
        b"x",
        b"-1",
    ]
    return rng.choice([b"%b-%b", b"%b-%b", b" %b - %b", b"%b-%b-"]) % (rng.choice(numbers), rng.choice(numbers))


def chosen(rng: random.Random) -> Iterator[Any]:
    """Requests whose query the application puts into its header fields."""
    data = b""
    for _ in range(rng.randint(1, 4)):
        query = b"".join(rng.choice([*ESCAPED, b"b", b"b"]) for _ in range(rng.randint(1, 4)))
        data += rng.choice([b"GET", b"HEAD", b"POST"]) + b" /?%b HTTP/1.1\r\nHost: x\r\n" % query
        data += b"Content-Length: 3\r\n\r\nabc" if rng.random() < 0.3 else b"\r\n"
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
