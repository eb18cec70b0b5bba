"""What the clients of one kind have seen: requests, failures by kind, how long they waited."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

WAIT_S = 30.0  # a client that waits longer for a byte is stalled


class Wrong(Exception):
    """A server has sent other bytes than it should have."""


class Closed(Exception):
    """A server has closed a kept connection, between two requests, as HTTP allows. No request is lost."""


def kind_of(error: BaseException) -> str:
    """Return the name of a failure."""
    names: dict[type[BaseException], str] = {
        ConnectionRefusedError: "refused",
        ConnectionError: "reset",
        EOFError: "eof",  # with asyncio.IncompleteReadError
        Wrong: "wrong",
        TimeoutError: "stalled",
    }
    for type_, name in names.items():
        if isinstance(error, type_):
            return name
    return f"other: {error!r}"


class Tally:
    """Counts what the clients of one kind have seen.

    A client does everything inside of `request`. So each request is answered, has failed, or is still waiting: what is
    none of these is `unaccounted`, a mistake of the client itself.
    """

    def __init__(self) -> None:
        self.asked = self.answered = self.closed = 0
        self.failures: Counter[str] = Counter()
        self.examples: list[str] = []  # of the first failures
        self.waits_s: list[float] = []
        self.silences_s: dict[object, float] = {}  # the longest of each client
        self.waiting: dict[object, float] = {}  # since when a client has waited for a byte
        self.versions: dict[object, int] = {}  # of the server, as each client has last seen it

    @contextmanager
    def request(self, client: object) -> Iterator[None]:
        """Count one request of a client, and how long it waits for the whole answer."""
        self.asked += 1
        began = self.waiting[client] = time.monotonic()
        try:
            yield
        except Closed:
            self.asked -= 1
            self.closed += 1
            raise
        else:
            self.answered += 1
            self.waits_s.append(time.monotonic() - began)
        finally:
            self.progress(client)
            del self.waiting[client]

    def progress(self, client: object) -> None:
        """Note that a client has got a byte that it waited for, or has had one taken."""
        now = time.monotonic()
        self.silences_s[client] = max(self.silences_s.get(client, 0.0), now - self.waiting[client])
        self.waiting[client] = now

    def fail(self, client: object, error: BaseException) -> None:
        self.failures[kind_of(error)] += 1
        if len(self.examples) < 5:
            self.examples.append(f"{client}: {error!r}")

    def figures(self) -> dict[str, Any]:
        """Return the figures. Waits and silences are those since the last call, all else is of the whole time."""
        now = time.monotonic()
        waits, self.waits_s = sorted(self.waits_s), []
        for client, since in self.waiting.items():
            self.silences_s[client] = max(self.silences_s.get(client, 0.0), now - since)
        silences, self.silences_s = sorted(self.silences_s.values()), {}
        return {
            "asked": self.asked,
            "answered": self.answered,
            "closed": self.closed,
            "failures": dict(self.failures),
            "unaccounted": self.asked - self.answered - len(self.waiting) - sum(self.failures.values()),
            "examples": self.examples,
            "p50_ms": quantile(waits, 0.5) * 1000,
            "p99_ms": quantile(waits, 0.99) * 1000,
            "max_ms": quantile(waits, 1) * 1000,
            "silence_p99_ms": quantile(silences, 0.99) * 1000,  # of the clients: each has one longest silence
            "silence_max_ms": quantile(silences, 1) * 1000,
            "versions": dict(Counter(self.versions.values())),
        }


def quantile(waits: list[float], share: float) -> float:
    return waits[min(len(waits) - 1, int(len(waits) * share))] if waits else 0.0
