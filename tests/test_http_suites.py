"""The request corpora of gunicorn and llhttp over sockets, and every way to cut requests into pieces."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reqtable.http.answer import head_of
from reqtable.table.errors import HandlerError
from reqtable.testing import exercise
from tests.http_suites import corpora, corpus
from tests.support import served

needs_corpus = pytest.mark.skipif(corpus.path() is None, reason="no http_requests.jsonl: set REQTABLE_CORPORA")


@needs_corpus
def test_what_others_call_invalid_is_refused():
    with served(corpora.Answers) as server:
        counted, let_through = corpora.send_invalid(server)
    assert set(let_through) == set(corpus.ANSWERED)
    assert counted["gunicorn", True] >= corpora.GUNICORN_MIN, counted
    assert counted["llhttp", True] >= corpora.LLHTTP_MIN, counted


@needs_corpus
def test_what_others_call_valid_is_answered():
    with served(corpora.Answers) as server:
        accepted, refused, unexpected = corpora.send_valid(server)
    assert not unexpected
    assert accepted >= corpora.VALID_MIN, (accepted, refused)
    assert set(refused) == set(corpus.REFUSED), set(corpus.REFUSED) - set(refused)  # else a reason is left over


CHUNKED = b"PUT /c HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
REQUESTS = [
    b"GET /a HTTP/1.1\r\nHost: x\r\nConnection: foo\r\n\r\n",
    b"\r\nPOST /b HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello",
    CHUNKED + b"3;a=b\r\nabc\r\nA \r\n0123456789\r\n0\r\n\r\n",  # white space after a size
    CHUNKED + b"3;a=b\r\nabc\r\nA\r\n0123456789\r\n0\r\nT: u\r\n\r\n",
    b"POST /d HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nab",
    b"GET /e HTTP/1.0\r\n\r\n",
    b"GET /f HTTP/1.1\r\nHost: x\n\r\n",
    b"GET /g HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx",
]


def output_of(pieces: list[bytes]) -> bytes:
    client = exercise(corpora.Answers)
    for piece in pieces:
        if piece and not client.is_over:
            client.send(piece)
    if not client.is_over:
        client.end()
    return re.sub(rb"Date: [^\r]*\r\n", b"", client.output)


@pytest.mark.parametrize("data", REQUESTS)
def test_byte_by_byte_and_cut_at_any_place(data: bytes) -> None:
    whole = output_of([data])
    assert whole
    assert output_of([data[at : at + 1] for at in range(len(data))]) == whole
    for at in range(1, len(data)):
        assert output_of([data[:at], data[at:]]) == whole, at


@given(st.lists(st.tuples(st.text(), st.text() | st.binary().map(lambda data: data.decode("latin-1"))), max_size=3))
@settings(max_examples=300, deadline=None)
def test_no_header_field_of_an_application_splits_an_answer(fields: list[tuple[str, str]]) -> None:
    try:
        head = head_of(200, fields)
    except HandlerError:
        return
    lines = head.split(b"\r\n")
    assert lines == [b"HTTP/1.1 200 OK", *[f"{name}: {value}".encode("latin-1") for name, value in fields], b"", b""]
    assert head.count(b"\r") == head.count(b"\n") == len(fields) + 2


@given(st.lists(st.sampled_from(REQUESTS), min_size=1, max_size=4), st.lists(st.integers(0, 500), max_size=8))
@settings(max_examples=150, deadline=None)
def test_several_requests_cut_at_several_places(requests: list[bytes], cuts: list[int]) -> None:
    data = b"".join(requests)
    places = sorted({0, len(data), *[each % len(data) for each in cuts]})
    pieces = [data[start:end] for start, end in pairwise(places)]
    assert output_of(pieces) == output_of([data])
