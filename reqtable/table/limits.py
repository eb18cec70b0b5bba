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
    """Holds the bounds of one engine. With workers, each worker has its own engine, so each bound is for one worker.

    A name that ends in `_s` is a number of seconds. A name with `bytes` in it is a number of bytes. Any other number is
    a count. None means no bound. `inf` is a number of seconds, too.

    Raises ValueError, naming the field, if a value is not positive or if two values contradict each other. A default
    that contradicts a value that was set is adjusted instead.
    """

    entries_max: int = 100_000
    """The largest number of requests in the table. Lower it if the machine's memory, or the limit of descriptors,
    allows fewer."""

    entries_per_peer_max: int | None = None
    """The largest number of requests from one address, or from one /64 network of IPv6. Set it if one client must not
    take all places."""

    when_full: str = "wait"
    """What happens to new connections when the table is full. `"wait"` leaves them in the kernel's queue. `"reject"`
    sends them the handler's `refusal`, and closes them: choose it if clients can try another server. `"evict"` ends the
    request that has been idle longest: choose it if most clients are idle."""

    accepts_per_s_max: int | None = None
    """The most new connections a second, on average; others wait in the kernel's queue. Set it if a storm of
    reconnecting clients slows down those that are connected."""

    buffered_bytes_max: int | None = 2**30
    """Bytes of input and output in the buffers of all requests. Above it the request with the largest buffers ends. Set
    it well below the machine's memory."""

    accepts_per_pass: int = 16
    """New requests that one listener may accept in one pass of the loop. Raise it if the kernel's queue overflows in
    bursts; lower it if bursts of new clients delay the others."""

    expiries_per_pass: int = 16
    """Deadlines that the loop looks at in one pass; others wait for the next pass. Raise it if many thousands of
    requests time out at the same moment."""

    steps_per_pass: int = 64
    """Steps that one request may take in one pass; then it waits for its turn. Lower it if busy clients delay
    others."""

    recv_bytes: int = 65_536
    """Bytes that one request may receive in one pass. Raise it for large uploads on a fast network; lower it to share
    the loop more evenly."""

    send_bytes: int = 262_144
    """Bytes that one request may send at once; then others have their turn. Raise it for large downloads to few
    clients."""

    pass_bytes: int = 2**20
    """Bytes that all requests may send in one pass; then large output waits for the next pass. Raise it if the server
    mainly sends large files."""

    high_water_bytes: int = 65_536
    """Unsent output above which a request's steps wait for its client. Raise it if a handler's steps are expensive, and
    memory is not; lower it for many slow clients."""

    input_bytes_max: int = 64 * 2**20
    """The largest count that `exactly(n)` accepts, because the count often comes from the client. Lower it to the
    largest message of your protocol."""

    output_bytes_max: int = 64 * 2**20
    """Unsent output of one request above which `send` raises LimitExceeded. Raise it if one answer is larger than this
    and can't be sent in parts."""

    told_max: int = 1024
    """Items told to one request that it has not taken; `tell` refuses the next one and returns False. Raise it if
    messages come in bursts; lower it if a slow client should miss messages sooner."""

    connections_max: int = 10_000
    """Outgoing connections, apart from `entries_max`; above it `connect` fails at once. Lower it to what the other
    services accept."""

    inbox_max: int = 64
    """Datagrams that wait for one session; later datagrams are dropped, as a network may do. Raise it if clients send
    bursts and the log counts dropped datagrams."""

    calls_max: int = 32
    """Threads that run the functions of `call(…)`. Raise it if calls wait for other services; leave it if they
    compute."""

    handshake_timeout_s: float = 10.0
    """The time for a PROXY header and a TLS handshake together. Raise it for clients far away or on slow machines."""

    connect_timeout_s: float = 10.0
    """The time to make an outgoing connection: name look-up, all addresses and the TLS handshake together. Lower it if
    a client should hear sooner that another service is down."""

    connections_idle_s: float = 60.0
    """The time for which a released outgoing connection is kept for reuse. Keep it below the idle timeout of the other
    service."""

    idle_timeout_s: float | None = None
    """The silence of a client whose request waits for input, while no input is unread. Set it if clients vanish without
    closing their connection."""

    read_timeout_s: float = 60.0
    """The time from the first byte of an input to its last. An input that arrives at `read_bytes_per_s_min` or faster
    gets the same time again. Lower it against clients that send slowly on purpose. A wait with a timeout of its own
    uses that instead."""

    read_bytes_per_s_min: int = 100
    """The rate at which an input must arrive to get more than `read_timeout_s`. Raise it against clients that send
    slowly on purpose; lower it for clients on very slow links."""

    keepalive_s: float | None = None
    """The silence after which the kernel probes a TCP client (tcp(7)). The client is lost if it answers no probe for as
    long again. Set it to find clients whose machine or network has gone, while silent clients may stay. At most 32,767,
    in whole seconds."""

    write_timeout_s: float = 60.0
    """The time during which a client takes none of the output that waits for it; then its connection ends. Lower it to
    free memory sooner; raise it for clients that pause."""

    linger_timeout_s: float = 2.0
    """The wait for the client's end of file after our last byte, so that the answer is not cut off. Raise it if clients
    on slow links lose the end of an answer."""

    session_timeout_s: float = 60.0
    """The silence of a datagram session whose handler names no timeout. Set it to how long your protocol retries."""

    request_timeout_s: float | None = None
    """The time for a whole request, in every state; for HTTP, each request of a connection. It can't end a blocking
    handler that runs under policy `inline`. Set it as a last resort against requests that never end."""

    loop_stall_s: float = 0.5
    """The time after which a warning names the line of a step that holds up the loop. Lower it to find blocking calls;
    `inf`: no warning."""

    drain_timeout_s: float = 30.0
    """The time for the remaining requests when the server was told to end. Keep it below the time after which the
    service manager kills the server (systemd's `TimeoutStopSec=`)."""

    drain_idle_s: float = 1.0
    """The silence after which a connection sees end of file during a drain, as if its client had closed. Raise it if
    clients pause between two parts of one task."""

    accept_pause_s: float = 0.5
    """The pause of accepting when the system is out of descriptors or memory. There is seldom a reason to change
    it."""

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
