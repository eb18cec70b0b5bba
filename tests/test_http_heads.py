"""The heads that we accept are accepted by llhttp, too, which reads the same fields in them (`httptools`)."""

from __future__ import annotations

import contextlib
import random
import string
from collections.abc import Callable
from typing import Any

import httptools
import pytest

from reqtable.http.head import _BLOCKS, BadRequest, parse_head
from tests.fuzz_http import FIELDS, LINES, ODD
from tests.http_suites import corpus

# Any other method is refused by llhttp, while we leave it to the handler, which answers 501.
_METHODS_OF_LLHTTP = {b"GET", b"POST", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"TRACE", b"CONNECT"}


class Seen:
    """Gathers what llhttp finds in a head."""

    def __init__(self) -> None:
        self.target = b""
        self.fields: list[tuple[str, str]] = []

    def on_url(self, target: bytes) -> None:
        self.target += target

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name.decode("latin-1").lower(), value.decode("latin-1").rstrip(" \t")))


def seen_by_llhttp(data: bytes) -> tuple[bytes, Seen]:
    """Return the method and what else llhttp finds. Raises HttpParserError if llhttp refuses the head."""
    seen = Seen()
    parser = httptools.HttpRequestParser(seen)
    with contextlib.suppress(httptools.HttpParserUpgrade):  # it is no error: what follows is another protocol
        parser.feed_data(data)
    return parser.get_method(), seen


def made() -> list[bytes]:
    """Return heads that fit, or not, made from the parts that the fuzzer has."""
    rng = random.Random(18)
    found = []
    for _ in range(3000):
        odd = ODD[:-1] if rng.random() < 0.9 else ODD
        lines = [rng.choice(LINES[:4]).replace(b"%s", rng.choice([*odd, b"a", b"a", b"a", b"a"])), b"Host: x"]
        lines += [
            rng.choice(FIELDS).replace(b"%s", rng.choice(odd)).replace(b"%d", b"5") for _ in range(rng.randint(0, 3))
        ]
        for _ in range(rng.randint(0, 2)):
            name = "".join(rng.choices(string.ascii_letters + "-_!", k=5)).encode()
            lines.append(
                name + rng.choice([b":", b": ", b":\t", b" :"]) + rng.choice([b"v", b"v ", b"\xe9", b"a,b", b""])
            )
        found.append(b"\r\n".join(lines) + b"\r\n\r\n")
    return found


def of_corpus() -> list[bytes]:
    """Return the heads that other projects test their parsers with."""
    wholes = [case.with_host() for case in corpus.cases()]
    return [data[: data.index(b"\r\n\r\n") + 4] for data in wholes if b"\r\n\r\n" in data]


needs_corpus = pytest.mark.skipif(corpus.path() is None, reason=corpus.MISSING)
with_heads = pytest.mark.parametrize(
    ("heads", "least"), [(made, 500), pytest.param(of_corpus, 50, marks=needs_corpus)], ids=["made", "corpus"]
)


@with_heads
def test_what_we_accept_llhttp_reads_in_the_same_way(heads: Callable[[], list[bytes]], least: int) -> None:
    accepted = refused = 0
    for data in heads():
        try:
            head = parse_head(data.lstrip(b"\r\n"))
        except BadRequest:
            refused += 1
            continue
        if head.method.encode() not in _METHODS_OF_LLHTTP:
            continue
        accepted += 1
        method, seen = seen_by_llhttp(data)
        assert (method.decode(), seen.target.decode("latin-1")) == (head.method, head.target), data
        ours: Any = [each for each in head.fields if each[0] != "host"]  # that of a target with an authority is moved
        assert ours == [each for each in seen.fields if each[0] != "host"], data
    assert accepted > least
    assert refused > least


def result_of(data: bytes) -> Any:
    try:
        return parse_head(data)
    except BadRequest as error:
        return error.status, error.reason


@with_heads
def test_a_head_is_the_same_whatever_came_before(heads: Callable[[], list[bytes]], least: int) -> None:
    remembered = 0
    for data in heads():
        _BLOCKS.clear()
        alone = result_of(data)
        assert result_of(data) == alone
        remembered += len(_BLOCKS)
    assert remembered > least
    _BLOCKS.clear()
    hosts = [b"GET http://a/ HTTP/1.1", b"GET / HTTP/1.1", b"GET / HTTP/1.0", b"OPTIONS * HTTP/1.1"]
    found = [parse_head(line + b"\r\nHost: b\r\n\r\n") for line in hosts]
    assert [(each.get("host"), each.version) for each in found] == [
        ("a", (1, 1)),
        ("b", (1, 1)),
        ("b", (1, 0)),
        ("b", (1, 1)),
    ]
    assert len(_BLOCKS) == 2, "of each version"


@pytest.mark.parametrize("secret", [b"Cookie: id=1", b"authorization: Basic YTpi", b"Proxy-Authorization: x"])
def test_a_secret_is_not_remembered(secret: bytes) -> None:
    _BLOCKS.clear()
    assert len(parse_head(b"GET / HTTP/1.1\r\nHost: b\r\n" + secret + b"\r\n\r\n").fields) == 2
    assert not _BLOCKS


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
        b"GET /a#b HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent_Length: 3\r\n\r\n",
    ],
)
def test_where_we_are_stricter(data: bytes) -> None:
    with pytest.raises(BadRequest):
        parse_head(data)


@pytest.mark.parametrize("fault", [b"Content-Length: 5\r\nTransfer-Encoding: chunked", b"no field at all"])
def test_the_fault_of_the_first_line_is_told_before_those_of_the_fields(fault):
    with pytest.raises(BadRequest, match="a fragment in the target"):
        parse_head(b"POST /a#b HTTP/1.1\r\nHost: x\r\n" + fault + b"\r\n\r\n")
