"""Every bound of an engine in one place. The names carry the units.

A limit belongs to the entry or to the loop, never to a policy, so it holds under every policy.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

_KEEPALIVE_MAX_S = 32_767  # the kernel's own bound (MAX_TCP_KEEPIDLE in linux/tcp.h)
WHEN_FULL = ("wait", "reject", "evict")
# The first limit bounds a part of what the second bounds. If it were above the second, it could never be reached.
_WITHIN = (
    ("high_water_bytes", "output_bytes_max"),
    ("output_bytes_max", "buffered_bytes_max"),
    ("input_bytes_max", "buffered_bytes_max"),
    ("entries_per_peer_max", "entries_max"),
)


@dataclass(frozen=True, slots=True)
class Limits:
    """Holds the bounds of one engine. `_max` is a count unless the name says bytes; `_s` is seconds.

    Raises ValueError, naming the field, if a value is not positive or if two values contradict each other. A default
    that contradicts a value that was set is adjusted instead.
    """

    entries_max: int = 100_000  # requests in the table
    entries_per_peer_max: int | None = None  # requests from one address, or one /64 network of IPv6; None: no bound
    when_full: str = "wait"  # or "reject", or "evict": what happens to new connections when the table is full
    accepts_per_s_max: int | None = None  # new connections a second, on average; above it the listeners are not polled
    buffered_bytes_max: int | None = 2**30  # buffers of all requests; above it the request with the largest ends
    accepts_per_pass: int = 16  # new requests that one listener may accept in one pass
    expiries_per_pass: int = 16  # deadlines looked at in one pass; the others wait for the next pass
    steps_per_pass: int = 64  # steps one request may take in one pass; then it waits for its turn
    recv_bytes: int = 65_536  # bytes one request may receive in one pass
    send_bytes: int = 262_144  # bytes one request may send at once; then others have their turn
    pass_bytes: int = 2**20  # bytes all requests may send in one pass; then large output waits for the next pass
    high_water_bytes: int = 65_536  # unsent output above which a request's steps wait for its peer
    input_bytes_max: int = 64 * 2**20  # the largest n of `exactly(n)`, which often comes from the peer
    output_bytes_max: int = 64 * 2**20  # unsent output above which `send` raises LimitExceeded
    told_max: int = 1024  # items told to one request that it has not taken; `tell` refuses the next
    connections_max: int = 10_000  # outgoing connections, apart from entries_max; above it `connect` fails at once
    inbox_max: int = 64  # datagrams waiting for one session; later datagrams are dropped, as by the network
    calls_max: int = 32  # threads that run `call`s
    handshake_timeout_s: float = 10.0  # for a PROXY header and a TLS handshake together
    connect_timeout_s: float = 10.0  # to make an outgoing connection: name look-up, all addresses and TLS together
    connections_idle_s: float = 60.0  # how long an outgoing connection that was released is kept for reuse
    idle_timeout_s: float | None = None  # how long a peer with no unread input may be silent; None: no bound
    read_timeout_s: float = 60.0  # to finish an item that has begun to arrive; extended if it arrives at this rate:
    read_bytes_per_s_min: int = 100  # (both apply if the wait has no timeout of its own)
    keepalive_s: float | None = (
        None  # a TCP client is probed when silent for so long, and lost after twice that; None: never
    )
    write_timeout_s: float = 60.0  # a connection ends if its peer takes no output for so long
    linger_timeout_s: float = 2.0  # how long to wait for the peer's end of file after our last byte
    session_timeout_s: float = 60.0  # for a datagram session without a timeout of its own
    request_timeout_s: float | None = None  # for a whole request, however it runs; None: no bound; HTTP: for each
    loop_stall_s: float = 0.5  # a warning is logged if a step holds up the loop for longer; inf: never
    drain_timeout_s: float = 30.0  # when `serve()` is told to end, how long the remaining requests may take
    drain_idle_s: float = 1.0  # meanwhile, connections idle for so long see end of file
    accept_pause_s: float = 0.5  # how long accepting pauses when the system is out of descriptors or memory

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "when_full":
                if value not in WHEN_FULL:
                    raise ValueError(f"when_full must be one of {', '.join(WHEN_FULL)}, not {value!r}")
                continue
            if value is None and "None" in str(field.type):
                continue
            seconds = field.name.endswith("_s")
            fits = isinstance(value, int | float if seconds else int) and not isinstance(value, bool)
            if not fits or not value > 0:  # NaN is not above 0 either
                kind = "number of seconds" if seconds else "whole number"
                is_number = isinstance(value, int | float)
                mend = " (or leave it out)" if "None" in str(field.type) and not is_number else ""
                raise ValueError(f"{field.name} must be a {kind} above 0, not {value!r}{mend}")
        if self.keepalive_s is not None and self.keepalive_s > _KEEPALIVE_MAX_S:
            raise ValueError(f"keepalive_s must be at most {_KEEPALIVE_MAX_S}, not {self.keepalive_s!r}")
        for narrow, wide in _WITHIN * 2:  # twice: a default that was adjusted may bound another limit
            self._hold_within(narrow, wide)

    def _hold_within(self, narrow: str, wide: str) -> None:
        small, large = getattr(self, narrow), getattr(self, wide)
        if small is None or large is None or small <= large:
            return
        defaults = {field.name: field.default for field in fields(self)}
        if small == defaults[narrow]:
            object.__setattr__(self, narrow, large)
        elif large == defaults[wide]:
            object.__setattr__(self, wide, small)
        else:
            raise ValueError(f"{narrow} ({small}) must not be above {wide} ({large}): lower it, or raise {wide}")
