"""The journal of a worker: wherever the worker died while it wrote, a reader finds the last whole record.

And the kernel's totals say how far the worker had come.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest

from reqtable.handover import sleeper
from reqtable.handover.journal import DONE, IDLE, OPEN, Found, Journal, Page, Slot, new_memory
from reqtable.handover.packed import Origin, Progress, pack, pack_lost, pack_origin, unpack
from reqtable.handover.taking_over import Disagreement, Rest, rest_of
from reqtable.handover.totals import Totals, cookie_of, has_totals, totals
from reqtable.table.engine_wants import ENDED, Sleeping
from reqtable.table.errors import NotMovable, ReqtableError
from reqtable.table.wants import exactly
from tests.support import open_descriptors

pytestmark = pytest.mark.skipif(sleeper.why_not_here() is not None, reason="this system has no sleepers")
WAIT_S = 10.0


@contextmanager
def memory() -> Iterator[int]:
    fd = new_memory()
    try:
        yield fd
    finally:
        os.close(fd)


def committed(journal: Journal, *texts: bytes) -> Slot:
    """Write records of one row, each with a commit of its own."""
    slot = Slot(7, 70)
    for text in texts:
        journal.write(slot, text, 1, 2)
        journal.commit()
    return slot


def payloads(journal: Journal) -> dict[int, bytes]:
    return {slot.id: found.payload for slot, found in journal.read()}


def copied(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


@contextmanager
def reader_of(image: bytes) -> Iterator[Journal]:
    """Another process's view of memory with these contents."""
    with memory() as fd:
        os.write(fd, image)
        yield Journal(fd)


# -- records ----------------------------------------------------------------------------------------------------------


def test_a_record_is_valid_from_the_commit_on() -> None:
    with memory() as fd:
        journal = Journal(fd)
        slot = Slot(7, 70)
        journal.write(slot, b"one", 1, 2)
        with reader_of(copied(fd)) as reader:
            assert payloads(reader) == {}
        journal.commit()
        with reader_of(copied(fd)) as reader:
            assert [(found.cookie, each[1:]) for found, each in reader.read()] == [(70, (1, 2, b"one", 2))]


def test_a_torn_write_leaves_the_record_before() -> None:
    """Written up to each of its bytes, in either order, and even if the commit's number were already there."""
    with memory() as fd:
        journal = Journal(fd)
        slot = committed(journal, b"first", b"second")
        before = copied(fd)
        journal.write(slot, b"third, which is longer", 3, 4)
        written = copied(fd)
    changed = [at for at, (old, new) in enumerate(zip(before, written, strict=True)) if old != new]
    assert len(changed) > 25
    for end in range(len(changed) + 1):
        for part in (changed[:end], changed[end:]):
            image = bytearray(before)
            for at in part:
                image[at] = written[at]
            with reader_of(bytes(image)) as reader:
                assert payloads(reader) == {7: b"second"}
                # A record that the dead process had half written must not become valid by a later commit.
                reader.write(Slot(8, 80), b"other", 0, 0)
                reader.commit()
                assert payloads(reader) == {7: b"second", 8: b"other"}


def test_a_record_whose_bytes_have_changed_is_not_taken() -> None:
    with memory() as fd:
        committed(Journal(fd), b"first", b"second")
        image = copied(fd)
    at = image.index(b"second")
    with reader_of(image[:at] + b"sEcond" + image[at + 6 :]) as reader:
        assert payloads(reader) == {7: b"first"}


def test_records_of_several_rows_become_valid_together() -> None:
    with memory() as fd:
        journal = Journal(fd)
        slots = [Slot(number, number) for number in range(1, 6)]
        for slot in slots:
            journal.write(slot, b"old", 0, 0)
        journal.commit()
        for slot in slots:
            journal.write(slot, b"new", 0, 0)
            with reader_of(copied(fd)) as reader:
                assert set(payloads(reader).values()) == {b"old"}
        journal.commit()
        with reader_of(copied(fd)) as reader:
            assert set(payloads(reader).values()) == {b"new"}


def test_a_row_that_is_freed_has_no_record() -> None:
    with memory() as fd:
        journal = Journal(fd)
        slot = committed(journal, b"first", b"second")
        journal.free(slot)
        with reader_of(copied(fd)) as reader:
            assert payloads(reader) == {}


def test_records_may_have_any_size_and_number() -> None:
    with memory() as fd:
        journal = Journal(fd)
        slots = {number: Slot(number, number) for number in range(1, 3001)}
        for turn in range(3):
            for number, slot in slots.items():
                journal.write(slot, b"%d " % turn * number, 0, 0)
                journal.commit()
        large = Slot(5000, 5000)
        journal.write(large, bytes(3_000_000), 0, 0)
        journal.commit()
        found = payloads(Journal(fd))
        assert found.pop(5000) == bytes(3_000_000)
        assert found == {number: b"2 " * number for number in slots}


def test_freed_memory_is_used_again() -> None:
    with memory() as fd:
        journal = Journal(fd)
        sizes = []
        for _ in range(4):
            slots = [Slot(number, number) for number in range(1, 2000)]
            for slot in slots:
                for text in (b"a" * 300, b"b" * 2_000, b"c" * 300):
                    journal.write(slot, text, 0, 0)
                    journal.commit()
            for slot in slots:
                journal.free(slot)
            sizes.append(os.fstat(fd).st_size)
        assert sizes[1:] == sizes[:1] * 3


def test_the_journal_takes_few_descriptors() -> None:
    """Python keeps one open for each part of the memory that is mapped."""
    with memory() as fd:
        before = open_descriptors()
        journal = Journal(fd)
        for number in range(1, 200):
            journal.write(Slot(number, number), b"x" * 1_500_000, 0, 0)
            journal.write(Slot(1000 + number, number), b"x" * 100_000, 0, 0)
        assert open_descriptors() - before < 25
        del journal


def test_large_records_give_their_memory_back() -> None:
    with memory() as fd:
        journal = Journal(fd)
        slot = Slot(1, 1)
        for _ in range(4):
            journal.write(slot, b"x" * 8_000_000, 0, 0)
            journal.commit()
        journal.free(slot)
        assert os.fstat(fd).st_blocks * 512 < 2_000_000


def test_a_segment_that_was_being_added_is_ignored() -> None:
    with memory() as fd:
        committed(Journal(fd), b"one")
        size = os.fstat(fd).st_size
        os.ftruncate(fd, size + 2**20)
        reader = Journal(fd)
        assert payloads(reader) == {7: b"one"}
        assert os.fstat(fd).st_size == size
        for number in range(20):
            reader.write(Slot(100 + number, 1), b"x" * 200_000, 0, 0)
        reader.commit()
        assert len(payloads(Journal(fd))) == 21


def test_a_journal_whose_process_died_while_it_was_made_is_made_again() -> None:
    with memory() as fd:
        os.ftruncate(fd, 100_000)
        assert len(Journal(fd, 1000).input) == 1000
        assert len(Journal(fd).input) == 1000


def test_a_successor_goes_on_with_the_journal() -> None:
    with memory() as fd:
        journal = Journal(fd)
        for number in (1, 2):
            journal.write(Slot(number, number), b"old", 0, 0)
            journal.commit()
        for generation in range(5):
            journal = Journal(fd)
            slots = {slot.id: slot for slot, _ in journal.read()}
            for slot in slots.values():
                journal.write(slot, b"by %d" % generation, 0, 0)
                journal.commit()
            assert payloads(Journal(fd)) == {1: b"by %d" % generation, 2: b"by %d" % generation}


# -- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_says_nothing_while_it_is_opened() -> None:
    with memory() as fd:
        journal = Journal(fd)
        images = [copied(fd)]
        numbers = journal.numbers

        class Watched:
            def __setitem__(self, at: int, value: int) -> None:
                numbers[at] = value
                images.append(copied(fd))

        journal.open(1, 10, 20)
        journal.close(b"answer")
        journal.numbers = Watched()  # type: ignore[assignment]
        journal.open(2, 30, 40)
    phases = []
    for image in images[1:]:
        with reader_of(image) as reader:
            page = reader.page()
            phases.append(page.phase)
            if page.phase == OPEN:
                assert page[:5] == (OPEN, 2, 0, 30, 40)
    assert phases == [IDLE] * 5 + [OPEN]


def test_the_page_has_the_output_once_it_is_closed() -> None:
    with memory() as fd:
        journal = Journal(fd)
        journal.open(1, 10, 20)
        assert Journal(fd).page()[:5] == (OPEN, 1, 0, 10, 20)
        assert Journal(fd).page().output == b""
        journal.close(b"answer")
        assert Journal(fd).page().phase == DONE
        assert Journal(fd).page().output == b"answer"
        journal.open(1, 10, 20)
        journal.close(None)
        assert Journal(fd).page().output == b""


# -- what is left -----------------------------------------------------------------------------------------------------


def page(phase: int, output: bytes = b"") -> Page:
    return Page(phase, 1, 5, 100, 50, b"input" + bytes(100), output)


def found(received: int = 100, sent: int = 50) -> Found:
    return Found(5, received, sent, b"")


@pytest.mark.parametrize(
    ("progress", "own", "now", "rest"),
    [
        (Progress("", unread=b"re"), None, (100, 50), (b"re", [])),
        (Progress("", unsent=[b"abc", b"def"]), None, (100, 54), (b"", [b"ef"])),
        (Progress("", unsent=[b"abc", b"def"]), None, (100, 53), (b"", [b"def"])),
        (Progress("", unsent=[b"abc", b"def"]), None, (100, 50), (b"", [b"abc", b"def"])),
        (
            Progress("", unsent=[b"abc"], is_simple=True),
            None,
            (170, 99),
            (b"", []),
        ),  # and many steps that changed nothing
        (Progress("", unread=b"re"), page(OPEN), (104, 50), (b"reinpu", [])),
        (Progress("", unread=b"re"), page(OPEN), (100, 50), (b"re", [])),
        (Progress(""), page(DONE, b"answer"), (105, 50), (b"", [b"answer"])),
        (Progress(""), page(DONE, b"answer"), (105, 52), (b"", [b"swer"])),
        (Progress(""), page(DONE, b"answer"), (105, 56), (b"", [])),
        (Progress("", unread=b"x", want=ENDED), None, (170, 50), (b"x", [])),  # its input is discarded
    ],
)
def test_what_is_left_follows_from_the_totals(
    progress: Progress, own: Page | None, now: tuple[int, int], rest: tuple[bytes, list[bytes]]
) -> None:
    assert rest_of(found(), progress, own, Totals(*now)) == Rest(*now, *rest, False)


@pytest.mark.parametrize(
    ("progress", "own", "now"),
    [
        (Progress(""), None, (99, 50)),
        (Progress(""), None, (101, 50)),
        (Progress("", unsent=[b"abc"]), None, (100, 54)),
        (Progress(""), None, (100, 49)),
        (Progress("", unread=b"re"), None, (101, 50)),
        (Progress(""), page(OPEN), (99, 50)),
        (Progress(""), page(OPEN), (100, 51)),
        (Progress(""), page(OPEN), (500, 50)),
        (Progress(""), page(DONE, b"answer"), (105, 57)),
    ],
)
def test_totals_that_do_not_go_with_the_record_are_refused(
    progress: Progress, own: Page | None, now: tuple[int, int]
) -> None:
    with pytest.raises(Disagreement, match="since its"):
        rest_of(found(), progress, own, Totals(*now))


# -- contents ---------------------------------------------------------------------------------------------------------

ORIGIN = Origin(1, "Notes", ("127.0.0.1", 80), "/run/x", 1.5, 3, 4)
CHANGING = ("ask", True, 2.5, True, b"un", [b"a", b"b"], True, True, 2, 9, None, 3, 7.5, None, None)


@pytest.mark.parametrize(
    ("fields", "are_scalars"),
    [
        ((None, True, 7, 1.5, "text", b"bytes"), True),
        ((2**80, "\ud800"), True),
        (([1, (2, 3)], {"a": {4}}), False),
        ({"only": (1,)}, False),
    ],
)
@pytest.mark.parametrize("want", [None, ENDED, exactly(7), Sleeping(1.0, 99.0)])
def test_what_was_packed_is_unpacked(fields: Any, are_scalars: bool, want: Any) -> None:
    payload = pack(pack_origin(ORIGIN), fields, are_scalars, want, CHANGING)
    packed, origin, progress = unpack(payload)
    assert (packed, origin) == (pack_origin(ORIGIN), ORIGIN)
    assert progress == Progress("", fields if isinstance(fields, dict) else progress.fields, want, *CHANGING)
    assert isinstance(fields, dict) or tuple(progress.fields) == fields
    assert progress.want is want if want in (None, ENDED) else progress.want == want


def test_a_value_that_is_no_data_is_refused() -> None:
    with pytest.raises(NotMovable, match="no plain data"):
        pack(pack_origin(ORIGIN), (object(),), False, None, CHANGING)


def test_a_request_that_is_lost_says_why() -> None:
    assert unpack(pack_lost(pack_origin(ORIGIN), "calls in flight"))[2] == Progress("calls in flight")


@pytest.mark.parametrize("payload", [b"", b"\0\0\0\1\xc1", pack_origin(ORIGIN), pack_origin(ORIGIN) + b"\xc1"])
def test_other_bytes_are_refused(payload: bytes) -> None:
    with pytest.raises(ReqtableError, match="can't be read"):
        unpack(payload)


# -- totals -----------------------------------------------------------------------------------------------------------


@contextmanager
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client's socket, and the accepted one."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.create_connection(listening.getsockname()) as client,
    ):
        own, _ = listening.accept()
        with own:
            for each in (client, own):
                each.settimeout(WAIT_S)
            yield client, own


def soon(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < until


def test_totals_count_what_was_received_and_sent() -> None:
    with connected() as (client, own):
        assert totals(own) == (0, 0)
        client.sendall(b"x" * 100)
        assert len(own.recv(30, socket.MSG_WAITALL)) == 30
        assert own.send(b"answer!") == 7
        assert totals(own) == (30, 7)
        assert client.recv(7, socket.MSG_WAITALL) == b"answer!"
        assert totals(own) == (30, 7)


def test_totals_leave_out_the_end_of_either_side() -> None:
    with connected() as (client, own):
        client.sendall(b"x" * 100)
        client.shutdown(socket.SHUT_WR)
        assert len(own.recv(30, socket.MSG_WAITALL)) == 30
        soon(lambda: len(own.recv(100, socket.MSG_PEEK)) == 70)
        own.sendall(b"answer!")
        assert totals(own) == (30, 7)
        assert len(own.recv(100, socket.MSG_WAITALL)) == 70
        assert own.recv(1) == b""
        assert totals(own) == (100, 7)
        own.shutdown(socket.SHUT_WR)
        assert totals(own) == (100, 7)
        assert client.recv(100, socket.MSG_WAITALL) == b"answer!"
        assert totals(own) == (100, 7)


def test_totals_of_a_side_that_has_ended_first() -> None:
    with connected() as (client, own):
        own.sendall(b"abc")
        own.shutdown(socket.SHUT_WR)
        assert client.recv(100, socket.MSG_WAITALL) == b"abc"
        assert totals(own) == (0, 3)
        client.sendall(b"more")
        assert own.recv(2, socket.MSG_WAITALL) == b"mo"
        client.close()
        soon(lambda: own.recv(10, socket.MSG_PEEK) == b"re")
        assert totals(own) == (2, 3)
        assert own.recv(10) + own.recv(10) == b"re"
        assert totals(own) == (4, 3)


def test_totals_count_what_the_peer_does_not_take() -> None:
    with connected() as (_, own), pytest.raises(BlockingIOError):
        own.setblocking(False)
        sent = 0
        while True:
            assert totals(own) == (0, sent)
            sent += own.send(bytes(100_000))


def test_a_cookie_is_that_of_the_socket_not_of_the_descriptor() -> None:
    with connected() as (client, own):
        with closing(socket.socket(fileno=os.dup(own.fileno()))) as other:
            assert cookie_of(other) == cookie_of(own) != cookie_of(client)
        assert has_totals(own)
    with socket.socket(socket.AF_UNIX) as unix, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
        assert not has_totals(unix)
        assert not has_totals(datagrams)
