"""HTTP requests as data: cut at every byte, recorded, restored and continued. What can't be recorded says so."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from reqtable import NotMovable, Transition, flushed, state
from reqtable.http import wsgi_handler
from reqtable.http.listing_budget import BUDGET
from reqtable.loop.freezing import Freezer
from reqtable.table.record import Record, record_of, restore
from reqtable.table.saving import head_of, read, save
from reqtable.testing.exercise import PEER, Exercise, exercise
from tests.http_client import files_of, folder_in
from tests.support import open_descriptors
from tests.test_http_exchange import GET, Plain, post, took


class InPlace:
    """Stands in for the policy of a WSGI application that runs in the loop."""

    name: ClassVar[str] = "inline"
    steps_on_loop: ClassVar[bool] = True
    takes_whole_requests: ClassVar[bool] = False
    forks: ClassVar[bool] = False


class Restored(Exercise):
    """Goes on with a request from its record, on another clock. Its want is asked again before any step."""

    def __init__(self, handler_class: Any, record: Record) -> None:
        self._record = record
        super().__init__(handler_class, False, PEER, None, None)

    def _begin(self) -> None:
        self._begun = True
        self.clock.jump(1000)
        self._loop.run_once(0)
        restore(self._record, self.entry, self.handler, self.clock.now)
        self._steps.table.add(self.entry)
        Freezer(self._steps).thaw(self.entry)
        self._go_on()


def moved(begun: Exercise) -> Record:
    """Return the record of a request after the way through bytes."""
    return read(head_of(save(begun.entry, "").record), type(begun.handler), begun.clock.now)


def without_dates(data: bytes) -> bytes:
    return re.sub(rb"Date: [^\r]*\r\n", b"", data)


class Takes(Plain):
    """Takes a body whole, or in pieces, and answers whole, or in pieces."""

    pieces: list[bytes] = []

    def on_body(self, piece: bytes) -> Transition:
        if self.request.path != "/pieces":
            return super().on_body(piece)
        self.pieces.append(piece)
        return None

    def do_PUT(self) -> Transition:
        self.begin_answer(200)
        return self.more

    @state(flushed())
    def more(self, _: None) -> Transition:
        self.write(b"".join(self.pieces))
        return self.end_answer()


CHUNKED = (
    b"%b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    b'3\r\nabc\r\n2;x="y"\r\nde\r\n1\r\nf\r\n0\r\nA: b\r\nOther: o\r\n\r\n'
)
REQUESTS = (
    b"GET /a?b=c HTTP/1.1\r\nHost: x\r\nA: b\r\n\r\n"
    + post(b"hello", b"x", b"Expect: 100-continue\r\n")
    + b"\r\n"
    + (CHUNKED % b"POST /chunks")
    + (CHUNKED % b"PUT /pieces")
    + b"HEAD / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
    + b"GET /end HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
)


@pytest.mark.parametrize("reads", [True, False], ids=["client reads", "client reads nothing"])
def test_a_request_that_is_cut_at_every_byte_goes_on(reads: bool) -> None:
    whole = without_dates(took(exercise(Takes).send(REQUESTS)))
    assert whole.count(b"HTTP/1.1 200 OK") == 6
    states = set()
    for cut in range(len(REQUESTS)):
        begun = exercise(Takes)
        if not reads:
            begun.read_nothing()
        begun.send(REQUESTS[:cut])
        record = moved(begun)
        states.add(record.handler_state)
        data = took(begun) if reads else b""
        later = Restored(Takes, record).send(b"".join(begun._wire.unread) + REQUESTS[cut:])
        assert without_dates(data + took(later)) == whole, cut
        assert later.is_over
        assert later.handler.request.received == 0
    assert states == {"head", "body", "chunk_size", "chunk", "chunk_end", "trailers"} | (set() if reads else {"more"})


def test_the_time_of_a_request_goes_on_with_another_clock() -> None:
    begun = exercise(Plain).send(post(b"hello")[:-1]).jump(7)
    later = Restored(Plain, moved(begun))
    entry = later.entry
    assert entry.table.now - later.handler.request.began_at == pytest.approx(7)
    assert entry.began_at == pytest.approx(later.handler.request.began_at)


def test_a_record_shares_nothing_with_the_request() -> None:
    begun = exercise(Plain).send(post(b"hello")[:-1])
    record = record_of(begun.entry, begun.handler)
    begun.send(b"o")
    later = Restored(Plain, record).send(b"!")
    assert took(later).endswith(b"hell!")


# -- WSGI -------------------------------------------------------------------------------------------------------------


def echo(environ: Any, start_response: Any) -> list[bytes]:
    start_response("200 OK", [])
    return [environ["REQUEST_METHOD"].encode(), b" ", environ["wsgi.input"].read()]


def parts(environ: Any, start_response: Any) -> Iterator[bytes]:
    start_response("200 OK", [])
    yield b"one"
    yield b"two"


def test_a_request_for_an_application_that_is_cut_at_every_byte_goes_on() -> None:
    site = wsgi_handler(echo)
    data = post(b"hello", b"x", b"Expect: 100-continue\r\n") + (CHUNKED % b"POST /chunks") + GET

    def begun_at(cut: int) -> Exercise:
        begun = exercise(site)
        begun.entry.policy = InPlace()  # type: ignore[assignment]
        return begun.send(data[:cut])

    whole = without_dates(took(begun_at(len(data))))
    assert whole.count(b"POST ") == 2
    for cut in range(len(data)):
        begun = begun_at(cut)
        later = Restored(site, moved(begun))
        later.entry.policy = InPlace()  # type: ignore[assignment]
        later.send(data[cut:])
        assert without_dates(took(begun) + took(later)) == whole, cut


def test_an_application_that_runs_is_no_data() -> None:
    before = open_descriptors()
    site = wsgi_handler(parts)
    begun = exercise(site)
    begun.entry.policy = InPlace()  # type: ignore[assignment]
    begun.read_nothing().send(post(bytes(20)))
    assert begun.handler.state_name == "application"
    with pytest.raises(NotMovable, match=r"^request \d+ of WSGI can't be recorded now: its application is running$"):
        save(begun.entry, "")
    begun.read_on()
    assert moved(begun).handler_state == "head"
    begun.reset()
    assert open_descriptors() == before


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_listing_that_is_half_sent_is_no_data(tmp_path: Path) -> None:
    root = folder_in(tmp_path)
    before = open_descriptors()
    begun = exercise(files_of(root)).read_nothing().send(b"GET /sub/deep/ HTTP/1.1\r\nHost: x\r\n\r\n")
    assert begun.handler.state_name == "rows"
    with pytest.raises(NotMovable, match=r"^request \d+ of Files can't be recorded now: a listing is half sent$"):
        save(begun.entry, "")
    begun.read_on()
    assert moved(begun).handler_state == "head"
    begun.reset()
    assert open_descriptors() == before
    assert BUDGET.held == 0
