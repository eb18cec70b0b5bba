"""WebSocket frames, messages and handshakes as data: by table, and with every split of the bytes."""

from __future__ import annotations

import json
import random
import tracemalloc
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reqtable.http.deflate import agree, deflate, inflate
from reqtable.http.frames import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    WebSocketClosed,
    WebSocketError,
    build_frame,
    close_payload,
    may_be_sent,
    parse_close,
    parse_frame_head,
    turned,
    unmask,
    whole_characters,
)
from reqtable.http.handshake import accept_of, is_same_origin, parse_handshake
from reqtable.http.head import BadRequest, parse_head
from reqtable.http.ws_messages import HalfMessage, WebSocketInput
from reqtable.table.errors import LimitExceeded
from reqtable.table.input import MISSING
from reqtable.table.output import Output
from tests.websockets_by_hand import ACCEPT, KEY, binary, close, frame, frames, handshake, ping, text

SETTINGS = settings(deadline=None, derandomize=True, database=None)

# -- heads of frames --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("length", [0, 1, 125, 126, 127, 65_535, 65_536, 100_000])
def test_a_frame_is_parsed_as_it_was_built(length: int, masked: bool) -> None:
    payload = bytes(range(256)) * (length // 256 + 1)
    payload = payload[:length]
    data = build_frame(BINARY, payload, mask=b"abcd" if masked else b"")
    head = parse_frame_head(data, masked=masked)
    assert head is not None
    assert (head.is_last, head.rsv1, head.opcode, head.length) == (True, False, BINARY, length)
    assert head.size + length == len(data)
    found = data[head.size :]
    assert (unmask(found, head.mask) if masked else found) == payload
    for cut in range(head.size):
        assert parse_frame_head(data[:cut], masked=masked) is None


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\x83\x80", "reserved opcode 3"),
        (b"\x8f\x80", "reserved opcode 15"),
        (b"\xc1\x80", "reserved bit"),
        (b"\xa1\x80", "reserved bit"),
        (b"\x91\x80", "reserved bit"),
        (b"\x81\x05", "not masked"),
        (b"\x09\x80", "control frame"),
        (b"\x89\xfe", "control frame"),
        (b"\x88\xff", "control frame"),
        (b"\x81\xfe\x00\x7d", "shortest form"),
        (b"\x81\xff" + (65_535).to_bytes(8, "big"), "shortest form"),
        (b"\x81\xff" + (2**63).to_bytes(8, "big"), "too large"),
    ],
)
def test_a_frame_that_may_not_be_sent(data: bytes, why: str) -> None:
    with pytest.raises(WebSocketError, match=why) as caught:
        parse_frame_head(data)
    assert caught.value.code == 1002


@pytest.mark.parametrize("opcode", [CONTINUATION, PING, CLOSE])
def test_only_the_first_frame_of_a_message_says_that_it_is_compressed(opcode: int) -> None:
    assert parse_frame_head(b"\xc1\x80abcd", may_deflate=True) is not None
    with pytest.raises(WebSocketError, match="reserved bit"):
        parse_frame_head(bytes([0xC0 | opcode, 0x80]), may_deflate=True)


@SETTINGS
@given(st.binary(max_size=10_000), st.binary(min_size=4, max_size=4), st.integers(0, 10_000))
def test_a_mask_goes_on_where_it_was(data: bytes, mask: bytes, cut: int) -> None:
    expected = bytes(each ^ mask[place % 4] for place, each in enumerate(data))
    assert unmask(data, mask) == expected
    cut = min(cut, len(data))
    assert unmask(data[:cut], mask) + unmask(data[cut:], turned(mask, cut)) == expected


# -- close frames -----------------------------------------------------------------------------------------------------


def test_the_codes_that_a_close_frame_may_have() -> None:
    may = [code for code in range(6000) if may_be_sent(code)]
    assert may == [1000, 1001, 1002, 1003, *range(1007, 1015), *range(3000, 5000)]


def test_a_close_frame_is_parsed_as_it_was_built() -> None:
    assert parse_close(b"") == (1005, "")
    assert parse_close(close_payload(1000)) == (1000, "")
    assert parse_close(close_payload(4999, "tschüß")) == (4999, "tschüß")
    code, reason = parse_close(close_payload(3000, "ä" * 100))
    assert (code, reason) == (3000, "ä" * 61)  # 123 bytes, and not half a character


@pytest.mark.parametrize(("payload", "code"), [(b"\x03", 1002), (b"\x03\xed", 1002), (b"\x03\xe8\xff", 1007)])
def test_a_close_frame_that_may_not_be_sent(payload: bytes, code: int) -> None:
    with pytest.raises(WebSocketError) as caught:
        parse_close(payload)
    assert caught.value.code == code


@pytest.mark.parametrize("code", [0, 999, 1005, 1006, 1015, 2000, 5000, "1000"])
def test_a_code_that_cant_be_sent_is_the_programs_mistake(code: Any) -> None:
    with pytest.raises(ValueError, match="use 1000, or one from 3000 to 4999"):
        close_payload(code)


# -- UTF-8 ------------------------------------------------------------------------------------------------------------


def may_go_on(data: bytes) -> bool:
    """Whether some text in UTF-8 begins with these bytes: whether up to three more make them text."""
    tails = [b""] + [bytes([second]) + rest for second in range(0x80, 0xC0) for rest in (b"", b"\x80", b"\x80\x80")]
    for tail in tails:
        try:
            (data + tail).decode()
        except UnicodeDecodeError:
            continue
        return True
    return False


@SETTINGS
@given(st.binary(max_size=6) | st.text(max_size=4).map(str.encode), st.integers(0, 8))
def test_bytes_are_refused_as_soon_as_they_cant_become_text(data: bytes, cut: int) -> None:
    data = data[:cut]
    try:
        count = whole_characters(data)
    except WebSocketError as error:
        assert error.code == 1007
        assert not may_go_on(data)
    else:
        data[:count].decode()
        assert len(data) - count <= 3
        assert may_go_on(data)


# -- messages ---------------------------------------------------------------------------------------------------------

LIMIT = 1000


class Reader:
    """Feeds an input piece by piece, and collects what comes of it, as a request would."""

    def __init__(self, deflates: bool = False, limit: int = LIMIT) -> None:
        self.input = WebSocketInput(limit)
        self.input.deflates = deflates
        self.output = Output()
        self.found: list[Any] = []
        self.is_over = False

    def feed(self, data: bytes) -> Reader:
        if data and not self.is_over:
            self.input.feed(data)
            self.read()
        return self

    def read(self) -> None:
        try:
            while True:
                item = self.input.message(self.input.limit, self.output)
                if item is not MISSING:
                    self.found.append(item)
                elif not self.input.is_behind:
                    return
        except WebSocketClosed as closed:
            self.found.append(("closed", closed.code, closed.reason))
        except WebSocketError as error:
            self.found.append(("error", error.code))
        except LimitExceeded:
            self.found.append("limit")
        self.is_over = True

    def move(self) -> None:
        """Go on with a new input that has what was saved of this one, as plain data."""
        saved = self.input.save()
        again = WebSocketInput(self.input.limit)
        again.deflates = self.input.deflates
        again.restore(json.loads(json.dumps(saved, default=lambda b: list(b)), object_hook=_bytes_again))
        assert again.save() == saved
        assert len(again) == len(self.input)
        self.input = again

    @property
    def answered(self) -> list[tuple[int, bytes]]:
        return list(frames(b"".join(self.output.pieces)))


def _bytes_again(plain: dict[str, Any]) -> dict[str, Any]:
    return {name: bytes(value) if isinstance(value, list) else value for name, value in plain.items()}


def fragments(opcode: int, *pieces: bytes, rsv1: bool = False) -> bytes:
    last = len(pieces) - 1
    return b"".join(
        frame(CONTINUATION if number else opcode, piece, number == last, rsv1 and not number)
        for number, piece in enumerate(pieces)
    )


PACKED = deflate(b"compressed " * 50, 15)
CASES: list[tuple[str, bytes, list[Any], list[tuple[int, bytes]]]] = [
    ("one text", text("hällo"), ["hällo"], []),
    ("one of no bytes", text("") + binary(b""), ["", b""], []),
    ("binary", binary(bytes(range(256))), [bytes(range(256))], []),
    ("fragments", fragments(TEXT, b"a", b"", b"bc", b"\xc3", b"\xa4"), ["abcä"], []),
    ("fragments of no bytes", fragments(BINARY, b"", b"", b""), [b""], []),
    (
        "a ping in between",
        frame(TEXT, b"a", False) + ping(b"x") + frame(CONTINUATION, b"b") + ping() + text("c"),
        ["ab", "c"],
        [(PONG, b"x"), (PONG, b"")],
    ),
    ("a pong that nobody asked for", frame(PONG, b"x" * 125) + text("a"), ["a"], []),
    ("a close", text("a") + close(3001, "grüße") + text("b"), ["a", ("closed", 3001, "grüße")], []),
    ("a close without a code", close(None), [("closed", 1005, "")], []),
    ("a close in between", frame(TEXT, b"a", False) + close(), [("closed", 1000, "")], []),
    ("nothing to continue", frame(CONTINUATION, b"a"), [("error", 1002)], []),
    ("text within a text", frame(TEXT, b"a", False) + text("b"), [("error", 1002)], []),
    ("no text", frame(TEXT, b"\xff") + text("a"), [("error", 1007)], []),
    ("ends within a character", frame(TEXT, b"a\xe2\x82"), [("error", 1007)], []),
    ("ends within a character later", fragments(TEXT, b"a\xe2", b"\x82"), [("error", 1007)], []),
    ("ends within a character, empty end", fragments(TEXT, b"\xe2\x82", b""), [("error", 1007)], []),
    ("no text in mid-message", fragments(TEXT, b"a\xe2", b"\x28", b"b"), [("error", 1007)], []),
    ("as long as allowed", binary(bytes(LIMIT)), [bytes(LIMIT)], []),
    ("longer than allowed", binary(bytes(LIMIT + 1)), ["limit"], []),
    ("longer than allowed in the end", fragments(BINARY, bytes(LIMIT), b"", b"x"), ["limit"], []),
    ("compressed", frame(TEXT, PACKED, rsv1=True) + text("a"), ["compressed " * 50, "a"], []),
    ("compressed in parts", fragments(BINARY, PACKED[:5], PACKED[5:], rsv1=True), [b"compressed " * 50], []),
    ("compressed to nothing", frame(TEXT, deflate(b"", 15), rsv1=True), [""], []),
    ("compressed, and too long", frame(TEXT, deflate(bytes(LIMIT + 1), 15), rsv1=True), ["limit"], []),
    ("broken", frame(TEXT, b"\xff\xff\xff", rsv1=True), [("error", 1007)], []),
    ("compressed, and no text", frame(TEXT, deflate(b"\xff", 15), rsv1=True), [("error", 1007)], []),
]


@pytest.mark.parametrize(("data", "found", "answered"), [pytest.param(*case[1:], id=case[0]) for case in CASES])
def test_messages_in_every_split(data: bytes, found: list[Any], answered: list[tuple[int, bytes]]) -> None:
    whole = Reader(deflates=True).feed(data)
    assert (whole.found, whole.answered) == (found, answered)
    by_bytes = Reader(deflates=True)
    for place in range(len(data)):
        by_bytes.feed(data[place : place + 1])
    assert (by_bytes.found, by_bytes.answered) == (found, answered)
    for cut in range(1, min(len(data), 300)):
        halves = Reader(deflates=True).feed(data[:cut])
        halves.move()
        halves.feed(data[cut:])
        assert (halves.found, halves.answered) == (found, answered), cut


SHORT = [case for case in CASES if len(case[1]) < 400 and "error" not in str(case[2])]


@SETTINGS
@given(st.lists(st.sampled_from(SHORT), max_size=8), st.lists(st.integers(1, 60), min_size=1))
def test_messages_after_one_another(cases: list[Any], sizes: list[int]) -> None:
    found: list[Any] = []
    answered: list[tuple[int, bytes]] = []
    for _, _, one, its_pongs in cases:
        found += one
        answered += its_pongs
        if "closed" in str(one) or "limit" in one:
            break
    data = b"".join(case[1] for case in cases)
    reader = Reader(deflates=True)
    while data:
        size = sizes[len(data) % len(sizes)]
        reader.feed(data[:size])
        if not reader.is_over:
            reader.move()
        data = data[size:]
    assert (reader.found, reader.answered) == (found, answered)


def test_bad_utf_8_is_refused_before_its_frame_is_whole() -> None:
    data = frame(TEXT, b"a" * 100 + b"\xf4\x90" + b"b" * 100)
    reader = Reader().feed(data[:100])
    assert not reader.is_over
    assert reader.feed(data[100:110]).found == [("error", 1007)]


def test_a_message_that_is_too_long_is_refused_at_its_head() -> None:
    assert Reader().feed(binary(bytes(LIMIT + 1))[:8]).found == ["limit"]
    fragmented = frame(BINARY, bytes(600), False) + frame(CONTINUATION, bytes(401))[:8]
    assert Reader().feed(fragmented).found == ["limit"]


def test_what_inflates_beyond_the_limit_is_not_inflated() -> None:
    bomb = deflate(bytes(20_000_000), 15)
    tracemalloc.start()
    try:
        with pytest.raises(LimitExceeded):
            inflate(bomb, 100_000)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_what_follows_a_close_frame_is_dropped() -> None:
    unread = WebSocketInput()
    unread.feed(close() + text("a"))
    with pytest.raises(WebSocketClosed):
        unread.message(100, Output())
    assert unread.message(100, Output()) is MISSING
    assert len(unread) == 0


def test_half_a_message_is_little_data() -> None:
    reader = Reader().feed(frame(TEXT, b"half", False))
    saved = reader.input.save()
    assert saved["half"]["payload"] == b"half"
    assert len(json.dumps(saved, default=list)) < 475
    assert isinstance(reader.input.half, HalfMessage)


def test_a_fragment_of_a_byte_takes_a_byte() -> None:
    reader = Reader(limit=100_000)
    for _ in range(50_000):
        reader.feed(frame(CONTINUATION if reader.input.half else BINARY, b"x", False))
    assert len(reader.input) == 50_000


def test_frames_without_end_are_taken_in_turns() -> None:
    unread = WebSocketInput()
    unread.feed(ping() * 1000 + text("a"))
    output = Output()
    turns = 1
    while (item := unread.message(100, output)) is MISSING:
        assert unread.is_behind
        turns += 1
    assert (item, turns) == ("a", 4)
    assert len(output.pieces) == 1000


# -- compression ------------------------------------------------------------------------------------------------------


@SETTINGS
@given(st.binary(max_size=5000) | st.text(max_size=500).map(str.encode), st.integers(9, 15))
def test_a_message_is_inflated_as_it_was(data: bytes, bits: int) -> None:
    packed = deflate(data, bits)
    assert inflate(packed, len(data) + 1) == data
    assert read_with_window(packed + b"\x00\x00\xff\xff", bits) == data


def read_with_window(packed: bytes, bits: int) -> bytes:
    """Inflate as a client with a window of 2**`bits` bytes, in small pieces: else zlib sees more than its window."""
    unpacker = zlib.decompressobj(-bits)
    found, left = b"", packed
    while left:
        found += unpacker.decompress(left, 64)
        left = unpacker.unconsumed_tail
    return found + unpacker.flush()


def test_a_window_is_no_larger_than_agreed_upon() -> None:
    data = random.Random(1).randbytes(3000) * 2  # the repetition does not fit into a window of 512 bytes
    with pytest.raises(zlib.error, match="too far back"):
        read_with_window(deflate(data, 15), 9)
    assert read_with_window(deflate(data, 9), 9) == data


def test_the_examples_of_rfc_7692() -> None:
    assert inflate(bytes.fromhex("f248cdc9c90700"), 9) == b"Hello"
    assert inflate(bytes.fromhex("000500faff48656c6c6f00"), 9) == b"Hello"  # a block without compression
    assert inflate(bytes.fromhex("f348cdc9c9070000"), 9) == b"Hello"  # a block that ends zlib's stream
    assert inflate(bytes.fromhex("f24805000000ffffcac9c90700"), 9) == b"Hello"  # two blocks


def test_a_message_of_many_ended_streams_is_refused() -> None:
    with pytest.raises(WebSocketError, match="too many parts"):
        inflate(bytes.fromhex("0300") * 1000, 9)


OURS = "permessage-deflate; server_no_context_takeover; client_no_context_takeover"


@pytest.mark.parametrize(
    ("offers", "agreed"),
    [
        (None, (0, None)),
        ("", (0, None)),
        ("x-webkit-deflate-frame", (0, None)),
        ("permessage-deflate", (15, OURS)),
        ("Permessage-Deflate; client_max_window_bits", (15, OURS)),
        ("permessage-deflate; client_max_window_bits=8", (15, OURS)),
        ("permessage-deflate; client_max_window_bits=7", (0, None)),
        ("permessage-deflate; server_max_window_bits=10", (10, OURS + "; server_max_window_bits=10")),
        ('permessage-deflate; server_max_window_bits="10"', (10, OURS + "; server_max_window_bits=10")),
        ("permessage-deflate; server_max_window_bits=8", (0, None)),
        ("permessage-deflate; server_max_window_bits", (0, None)),
        ("permessage-deflate; server_max_window_bits=8, permessage-deflate", (15, OURS)),
        ("permessage-deflate; server_no_context_takeover=1", (0, None)),
        ("permessage-deflate; server_no_context_takeover; server_no_context_takeover", (0, None)),
        ("permessage-deflate; unknown", (0, None)),
        ("foo, permessage-deflate; server_no_context_takeover", (15, OURS)),
    ],
)
def test_which_offer_is_accepted(offers: str | None, agreed: tuple[int, str | None]) -> None:
    assert agree(offers) == agreed


# -- handshakes -------------------------------------------------------------------------------------------------------


def test_the_proof_of_the_rfcs_example() -> None:
    assert accept_of(KEY.decode()).encode() == ACCEPT


@pytest.mark.parametrize(
    ("old", "new", "status"),
    [
        (b"Version: 13", b"Version: 8", 426),
        (b"Sec-WebSocket-Version: 13\r\n", b"", 426),
        (KEY, b"dGhlIHNhbXBsZSBub25j", 400),
        (KEY, KEY + b"!", 400),
        (KEY, b"\xe4" + KEY, 400),
        (b"Sec-WebSocket-Key", b"X-Key", 400),
        (b"Host: example.com", b"Host: example.com\r\nContent-Length: 1", 400),
        (b"Host: example.com", b"Host: example.com\r\nSec-WebSocket-Key: " + KEY, 400),
    ],
)
def test_a_handshake_that_is_refused(old: bytes, new: bytes, status: int) -> None:
    data = handshake().replace(old, new)
    assert data != handshake()
    with pytest.raises(BadRequest) as caught:
        parse_handshake(parse_head(data))
    assert caught.value.status == status


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [(b"chat", "chat"), (b"superchat, chat", "chat"), (b"v1", "v1"), (b"v1,chat", "chat"), (b"none", None)],
)
def test_the_servers_choice_of_a_subprotocol(offered: bytes, chosen: str | None) -> None:
    head = parse_head(handshake(b"Sec-WebSocket-Protocol: " + offered))
    assert parse_handshake(head, ("chat", "v1")).subprotocol == chosen


@pytest.mark.parametrize(
    ("origin", "host", "is_same"),
    [
        (None, "example.com", True),
        ("https://example.com", "example.com", True),
        ("https://Example.com", "example.COM", True),
        ("http://example.com:8000", "example.com:8000", True),
        ("http://example.com:8000", "example.com", False),
        ("https://evil.com", "example.com", False),
        ("null", "example.com", False),
        ("https://example.com", None, False),
    ],
)
def test_which_pages_may_open_a_websocket(origin: str | None, host: str | None, is_same: bool) -> None:
    assert is_same_origin(origin, host) == is_same
