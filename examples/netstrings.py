"""A want of one's own: netstrings (https://cr.yp.to/proto/netstrings.txt), each answered by its bytes in reverse.

reqtable serve examples/netstrings.py:Reverse --bind tcp://127.0.0.1:7000
printf '5:hello,' | nc -N 127.0.0.1 7000     # answers 5:olleh,
"""

from reqtable import StateRequestHandler, Transition, state
from reqtable.wants import MISSING, LimitExceeded, Missing, PeerError, Waiting, Want, want_type

_HEAD_BYTES_MAX = 10  # nine digits and a colon


@want_type
class Netstring(Want[bytes]):
    """One netstring, of at most `limit` bytes. The item is what is in it."""

    limit: int

    def take(self, entry: Waiting) -> bytes | Missing:
        head = entry.input.peek(_HEAD_BYTES_MAX)
        digits, colon, _ = head.partition(b":")
        if digits and not digits.isdigit():
            raise PeerError(f"no netstring begins with {head!r}")
        if not colon:
            if len(head) == _HEAD_BYTES_MAX:
                raise PeerError(f"the length of a netstring has too many digits: {head!r}")
            return MISSING
        size = int(digits or b"0")
        if size > self.limit:
            raise LimitExceeded(repr(self), self.limit)
        whole = entry.input.exactly(len(digits) + 1 + size + 1)
        if whole is MISSING:
            return MISSING
        if not whole.endswith(b","):
            raise PeerError(f"a netstring of {size} bytes ends with {whole[-1:]!r}")
        return whole[len(digits) + 1 : -1]


class Reverse(StateRequestHandler):
    """Answers each netstring by its bytes in reverse."""

    @state(Netstring(1_000))
    def one(self, text: bytes) -> Transition:
        self.send(b"%d:%b," % (len(text), text[::-1]))
        return self.one
