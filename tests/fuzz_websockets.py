"""What `tests/fuzz.py` sends to a WebSocket: handshakes and frames that no client should send."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from reqtable.http import WebSocketHandler
from reqtable.http.deflate import deflate
from reqtable.http.frames import CONTINUATION, PING, TEXT, build_frame
from tests.websockets_by_hand import ACCEPT, close, handshake

_DEFLATES = b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits"
HONEST = handshake() + build_frame(TEXT, b"honest\n", mask=b"mask")
HONEST_ANSWER = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n\r\n"
    b"\x81\x07honest\n" % ACCEPT
)


class Echo(WebSocketHandler):
    """Sends back each message, and much for a number."""

    message_bytes_max = 20_000
    ping_s = 50.0

    def on_message(self, message: str | bytes) -> Any:
        if isinstance(message, bytes):
            self.send_bytes(message)
        elif message.isdecimal() and len(message) < 6:
            self.send_bytes(bytes(int(message)))
        else:
            self.send_text(message)


def _frame(rng: random.Random) -> bytes:
    """A frame, in which anything may be wrong."""
    opcode = rng.choice([0, 0, 1, 1, 2, 2, 8, 9, 9, 10, rng.randrange(16)])
    payloads = [b"", b"a", "hällo".encode(), b"30000", b"\xff\xfe", b"\xe2\x82", bytes(125), bytes(126), bytes(20_001)]
    payloads += [rng.randbytes(rng.choice([1, 130, 5000])), deflate(bytes(rng.choice([10, 30_000])), 15)]
    payload = rng.choice(payloads)
    if opcode == 8:
        payload = rng.choice([b"", b"\x03", b"\x03\xe8", b"\x03\xe8bye", b"\x03\xed", b"\x0f\xa0\xff", payload])
    whole = bytearray(
        build_frame(
            opcode,
            payload,
            is_last=rng.random() < 0.6,
            rsv1=rng.random() < 0.2,
            mask=b"" if rng.random() < 0.03 else rng.randbytes(4),
        )
    )
    if rng.random() < 0.1:
        whole[rng.randrange(min(14, len(whole)))] = rng.randrange(256)
    if rng.random() < 0.05:
        del whole[rng.randrange(len(whole)) :]
    return bytes(whole)


def frames(rng: random.Random) -> Iterator[Any]:
    """Frames after a handshake that is good."""
    yield handshake(*([_DEFLATES] if rng.random() < 0.5 else []))
    for _ in range(rng.randint(1, 12)):
        data = _frame(rng)
        if rng.random() < 0.3:
            cut = rng.randrange(len(data) + 1)
            yield data[:cut]
            yield data[cut:]
        else:
            yield data
        if rng.random() < 0.1:
            yield rng.choice([100, 10_000])  # reads
    if rng.random() < 0.3:
        yield close()


def floods(rng: random.Random) -> Iterator[Any]:
    """More small frames than one pass may look at."""
    yield handshake()
    small = rng.choice(
        [
            build_frame(PING, b"", mask=b"mask"),
            build_frame(PING, bytes(125), mask=b"mask"),
            build_frame(10, b"", mask=b"mask"),
            build_frame(TEXT, b"", mask=b"mask"),
            build_frame(TEXT, b"9", mask=b"mask"),
        ]
    )
    if rng.random() < 0.5:
        yield build_frame(TEXT, b"a", is_last=False, mask=b"mask")
        small = rng.choice([small, build_frame(CONTINUATION, rng.choice([b"", b"b"]), is_last=False, mask=b"mask")])
    yield small * rng.choice([300, 3000])
    yield rng.choice([0, 10_000])


def handshakes(rng: random.Random) -> Iterator[Any]:
    """A handshake in which some bytes are others, and what would follow it."""
    data = bytearray(handshake(_DEFLATES, b"Sec-WebSocket-Protocol: a, b", b"Origin: http://example.com"))
    for _ in range(rng.choice([0, 1, 1, 4])):
        data[rng.randrange(len(data))] = rng.choice([rng.randrange(256), 13, 10, 32, 58])
    if rng.random() < 0.3:
        del data[rng.randrange(len(data)) :]
    yield bytes(data)
    yield _frame(rng)
