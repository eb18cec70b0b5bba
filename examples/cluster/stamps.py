"""A line protocol whose heavy step runs where the configuration says: in a thread, in a process, or on a cluster.

A stamp proves that its maker has worked. It is a number: the SHA-256 of a text and the number begins with BITS zero
bits. A program needs 2**BITS attempts on average to find a stamp, and one attempt to check it.

`mint BITS TEXT` finds the stamp of a text. `check STAMP BITS TEXT` answers yes or no. `ping` answers pong.

    reqtable serve examples.cluster.stamps:Stamps
"""

import re
from hashlib import sha256

from reqtable import HandlerError, StateRequestHandler, Transition, call, line, state

BITS_MAX = 24
_MINT = re.compile(rb"mint (\d{1,2}) (.+)")
_CHECK = re.compile(rb"check (\d{1,18}) (\d{1,2}) (.+)")
_USAGE = b"mint BITS TEXT, check STAMP BITS TEXT, or ping; BITS is at most %d\n" % BITS_MAX


def is_stamp(stamp: int, bits: int, text: bytes) -> bool:
    """Return whether the number is a stamp of the text."""
    digest = sha256(b"%b %d" % (text, stamp)).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - bits) == 0


def mint(bits: int, text: bytes) -> int:
    """Find the smallest stamp of a text. A second run finds the same one, so a cluster may run it twice."""
    stamp = 0
    while not is_stamp(stamp, bits, text):
        stamp += 1
    return stamp


class Stamps(StateRequestHandler):
    """Checks stamps in the loop, and mints them where `call_on` of the configuration says."""

    @state(line(limit=500), timeout=60)
    def command(self, text: bytes) -> Transition:
        """Read a command."""
        text = text.strip()
        if (found := _MINT.fullmatch(text)) and int(found[1]) <= BITS_MAX:
            return self.minted, call(mint, int(found[1]), found[2])
        if (found := _CHECK.fullmatch(text)) and int(found[2]) <= BITS_MAX:
            self.send(b"yes\n" if is_stamp(int(found[1]), int(found[2]), found[3]) else b"no\n")
        else:
            self.send(b"pong\n" if text == b"ping" else _USAGE)
        return self.command

    @state(timeout=120)
    def minted(self, stamp: int) -> Transition:
        """Answer: the heavy step is done."""
        self.send(b"%d\n" % stamp)
        return self.command

    def on_timeout(self) -> Transition:
        """Answer if the heavy step takes too long. A client that says nothing is not answered."""
        if self.state_name == "minted":
            self.send(b"failed: the stamp took too long\n")
        return None

    def on_error(self, error: Exception) -> Transition:
        """Answer if the cluster has gone, and let the client ask again."""
        if not isinstance(error, ConnectionError | HandlerError):
            raise error
        self.send(f"failed: {error}\n".encode())
        return self.command
