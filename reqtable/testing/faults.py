"""The faults of a simulation, and how often they happen.

Whenever a fault may happen, a die is thrown. The result depends only on the seed, on the kind of fault, on the place (a
direction of a connection, a listener, the poll), and on how many throws there were for this kind and place. So leaving
out one fault hardly changes the others, and `shrink` can reduce the faults of a failure to those that matter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from math import inf
from typing import Any, Self
from zlib import crc32

_BITS = 2**64
_MASK = _BITS - 1


@dataclass(frozen=True, slots=True)
class Faults:
    """Sets the probability (0 to 1) of each kind of fault, each time that it may happen.

    The first group is on by default: a correct handler and its clients don't notice these faults. Clients do notice the
    second group, which is off by default. A client hit by a fault of the second group is not held to its expectations.
    Raises ValueError for a number that is not a probability.
    """

    split: float = 0.2  # sent data arrives in pieces
    delayed: float = 0.2  # a piece is late by up to `delay_max_s`; later data waits for it
    partial: float = 0.2  # send(2) takes only a part of the data
    would_block: float = 0.05  # EAGAIN although the poll reported the descriptor
    interrupted: float = 0.02  # EINTR
    small_buffer: float = 0.2  # the buffers of a connection hold only a few bytes
    spurious: float = 0.05  # the poll reports a descriptor that is not ready
    withheld: float = 0.1  # the poll leaves out a ready descriptor, this time
    early: float = 0.05  # the poll returns too early, and empty
    late: float = 0.1  # the poll returns up to 50 ms too late
    exhausted: float = 0.05  # accept(2) finds no descriptor free: EMFILE, ENFILE, ENOBUFS or ENOMEM
    slow_lookup: float = 0.1  # looking up a name takes up to 3 s
    misdirected: float = 0.1  # the first address of a name is wrong: it refuses, or never answers

    reset: float = 0.0  # the connection breaks as a piece is sent
    aborted: float = (
        0.0  # a connection is gone before it is accepted: ECONNABORTED, or a reset for the end that connects
    )
    refused: float = 0.0  # an upstream refuses a connection, or it can't even be tried: no route, no free port
    unanswered: float = 0.0  # an attempt to connect to an upstream is never answered
    unresolved: float = 0.0  # a name can't be looked up
    lost: float = 0.0  # a datagram never arrives
    repeated: float = 0.0  # a datagram arrives twice
    reordered: float = 0.0  # a later datagram overtakes this one
    cut: float = 0.0  # a datagram arrives without its end
    stalled: float = 0.0  # the server's process stands still for up to 100 s

    delay_max_s: float = 0.5
    only: frozenset[str] | None = None  # the names of the only faults that may happen (see `Report.faults`)

    def __post_init__(self) -> None:
        for kind in KINDS:
            rate = getattr(self, kind)
            if not isinstance(rate, int | float) or not 0 <= rate <= 1:
                raise ValueError(f"{kind} must be a probability, 0 to 1, not {rate!r}")
        if not 0 <= self.delay_max_s < inf:
            raise ValueError(f"delay_max_s must be seconds, 0 or more, not {self.delay_max_s!r}")

    @classmethod
    def none(cls) -> Self:
        """Return faults that never happen."""
        return cls(**dict.fromkeys(KINDS, 0.0))  # type: ignore[arg-type]

    def restricted_to(self, names: Iterable[str]) -> Faults:
        """Return a copy that allows only the named faults, as `Report.faults` names them. Raises ValueError."""
        names = [names] if isinstance(names, str) else list(names)
        for name in names:
            if name.partition("@")[0] not in KINDS or "#" not in name:
                raise ValueError(f"{name!r} is not the name of a fault in report.faults, such as 'split@c1>#2'")
        return replace(self, only=frozenset(names))


KINDS: tuple[str, ...] = tuple(field.name for field in fields(Faults) if field.name not in ("delay_max_s", "only"))


class Dice:
    """Makes every random decision of a simulation."""

    def __init__(self, seed: int, faults: Faults, on_fault: Callable[[str], None]) -> None:
        self.seed = seed
        self.faults = faults
        self.injected: list[str] = []  # the names of the faults that happened
        self.by_kind: Counter[str] = Counter()
        self._on_fault = on_fault
        self._throws: dict[tuple[str, str], list[int]] = {}  # for each kind and place: its own seed, and its throws

    def happens(self, kind: str, place: str) -> bool:
        """Return whether a fault of this kind happens at this place now."""
        rate = getattr(self.faults, kind)
        if not rate:
            return False
        number, throw = self._throw(kind, place)
        if throw >= rate * _BITS:
            return False
        name = f"{kind}@{place}#{number}"
        only = self.faults.only
        if only is not None and name not in only:
            return False
        self.injected.append(name)
        self.by_kind[kind] += 1
        self._on_fault(name)
        return True

    def draw(self, what: str, place: str, below: int) -> int:
        """Return a random whole number from 0 to `below` - 1."""
        return self._throw(what, place)[1] % below

    def _throw(self, kind: str, place: str) -> tuple[int, int]:
        known = self._throws.get((kind, place))
        if known is None:
            known = self._throws[kind, place] = [crc32(f"{self.seed}/{kind}@{place}".encode()) << 32 ^ self.seed, 0]
        known[1] += 1
        # splitmix64 (Steele, Lea, Flood 2014)
        z = (known[0] + known[1] * 0x9E3779B97F4A7C15) & _MASK
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
        return known[1], z ^ z >> 31


def shrink(fails: Callable[[Sequence[str]], Any], faults: Sequence[str], attempts_max: int = 200) -> list[str]:
    """Return the smallest subset of `faults` that still fails, as far as `attempts_max` attempts find it.

    `fails` takes some of the faults and returns whether the simulation fails with them. The search leaves out smaller
    and smaller parts, as ddmin does (Zeller and Hildebrandt 2002). Raises ValueError if even all `faults` don't fail.
    """
    left = list(faults)
    if not fails(left):
        raise ValueError("there is nothing to shrink: the simulation does not fail with these faults")
    attempts = 0
    if left and fails([]):
        return []
    part = max(1, len(left) // 2)
    while left and attempts < attempts_max:
        for begin in range(0, len(left), part):
            without = left[:begin] + left[begin + part :]
            attempts += 1
            if fails(without):
                left = without
                break
            if attempts >= attempts_max:
                break
        else:
            if part == 1:
                break
            part = max(1, part // 2)
        part = min(part, max(1, len(left)))
    return left
