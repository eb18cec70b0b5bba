"""Every bound of an engine in one place; the name carries the unit.

A limit belongs to the entry or to the loop, never to a policy, so it holds whatever runs the handler.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

_KEEPALIVE_MAX_S = 32_767  # the kernel's own bound (MAX_TCP_KEEPIDLE in linux/tcp.h)
WHEN_FULL = ("wait", "reject", "evict")
# What the first one bounds is part of what the second one does: were it above, it could never be reached.
_WITHIN = (
    ("high_water_bytes", "output_bytes_max"),
    ("output_bytes_max", "buffered_bytes_max"),
    ("input_bytes_max", "buffered_bytes_max"),
    ("entries_per_peer_max", "entries_max"),
)


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of one engine. `_max` is a count unless the name says bytes; `_s` is seconds.

    Raises ValueError, naming the field, for a value that is not positive, and for two that contradict each other. A
    default contradicts nothing that was set: it gives way.
    """

    entries_max: int = 100_000  # requests in the table
    entries_per_peer_max: int | None = None  # of one address, or one /64 of IPv6; None: as many as there may be at all
    when_full: str = "wait"  # or "reject", or "evict": what becomes of those who come when there is no room
    accepts_per_s_max: int | None = None  # new connections a second, on average; above it the listeners are not polled
    buffered_bytes_max: int | None = 2**30  # input and output that all requests hold; above it the largest ends
    accepts_per_pass: int = 16  # new requests one listener may bring in in one pass
    expiries_per_pass: int = 16  # deadlines looked at in one pass; those that are left have the next one
    steps_per_pass: int = 64  # steps one request may take in one pass; then it waits its turn
    recv_bytes: int = 65_536  # bytes one request may receive in one pass
    send_bytes: int = 262_144  # bytes one request may send at once; then others have their turn
    pass_bytes: int = 2**20  # bytes all requests may send in one pass; then who has much to send has the next one
    high_water_bytes: int = 65_536  # untaken output above which a request's steps wait for its peer
    input_bytes_max: int = 64 * 2**20  # the largest `exactly(n)` there may be: n is often the peer's own word
    output_bytes_max: int = 64 * 2**20  # untaken output above which `send` raises LimitExceeded
    inbox_max: int = 64  # datagrams that wait for one session; a later one is dropped, as the network would
    calls_max: int = 32  # threads that run `call`s
    handshake_timeout_s: float = 10.0  # a PROXY header and a TLS handshake have so long, together
    idle_timeout_s: float | None = None  # a peer of which nothing is waiting may be silent for so long; None: no bound
    read_timeout_s: float = 60.0  # what has begun to come has so long, and as long again if it comes at this rate:
    read_bytes_per_s_min: int = 100  # (both where a wait names no timeout of its own)
    keepalive_s: float | None = (
        None  # a silent TCP client is probed after so long, and lost after twice that; None: never
    )
    write_timeout_s: float = 60.0  # a peer that takes none of its output for so long is closed
    linger_timeout_s: float = 2.0  # how long to wait for the peer's end of file after our last byte
    session_timeout_s: float = 60.0  # a datagram session that names no timeout of its own
    request_timeout_s: float | None = None  # a whole request, however it runs; None: no bound
    loop_stall_s: float = 0.5  # a step that holds up the loop for longer is warned of; inf: none is
    drain_timeout_s: float = 30.0  # how long what has begun may take to finish when `serve()` is told to end
    drain_idle_s: float = 1.0  # who has been idle for so long meanwhile is told that there will be no more
    accept_pause_s: float = 0.5  # how long accepting rests when the machine is out of descriptors or memory

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
        for narrow, wide in _WITHIN * 2:  # one that gives way may be another's bound
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
