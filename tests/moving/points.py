"""Workers killed at any point of their work on the journal, by a seed: `python -m tests.moving points`."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.service import Service
from tests.support import Client

KILLS = 4
POINTS = 80  # about as many as a worker comes to in the conversation
ROUNDS = 8


class Talker:
    """Asks, and knows every byte that must come. Its questions leave in pieces."""

    def __init__(self, client: Client, chance: random.Random) -> None:
        self._client = client
        self._chance = chance
        self._count = 0
        self._numbers: list[int] = []

    def question(self) -> tuple[bytes, bytes]:
        """Return a question and its answer."""
        kind = self._chance.choice(["add", "add", "echo", "take", "big", "many", "sleep"])
        number = self._chance.randrange(1000)
        if kind == "echo":
            return b"echo %d\n" % number, b"echo %d\n" % number
        if kind == "take":
            data = self._chance.randbytes(self._chance.randrange(1, 400))
            return b"take %d\n%b" % (len(data), data), self._added(sum(data))
        if kind == "big":
            size = self._chance.choice([100, 20_000, 600_000])
            return b"big %d\n" % size, b"x" * size + b"\n"
        if kind == "many":
            numbers = [self._chance.randrange(100) for _ in range(self._chance.randrange(2, 40))]
            return b"".join(b"add %d\n" % each for each in numbers), b"".join(map(self._added, numbers))
        if kind == "sleep":
            return b"sleep 0.01\n", b"sleeping\n" + self._added(0)
        return b"add %d\n" % number, self._added(number)

    def _added(self, number: int) -> bytes:
        self._count += 1
        self._numbers = [*self._numbers, number][-4:]
        return b"%d %b\n" % (self._count, b" ".join(b"%d" % each for each in self._numbers))

    def ask(self) -> Iterator[None]:
        """Send a question in two pieces, then check its answer. Yields between these."""
        question, answer = self.question()
        cut = self._chance.randrange(len(question) + 1)
        self._client.send(question[:cut])
        yield
        self._client.send(question[cut:])
        yield
        came = self._client.receive(len(answer))
        if came != answer:
            raise AssertionError(f"{came[:100]!r} came instead of {answer[:100]!r} after {question[:100]!r}")


def converse(seed: int) -> int:
    """Have three clients converse with a server whose workers die at points that follow from the seed.

    Returns how many have died. Raises AssertionError or OSError if a byte is wrong or missing.
    """
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="reqtable-points-") as folder, ExitStack() as stack:
        path = Path(folder)
        (path / "reqtable.toml").write_text("takeover = true\ntakeover_attempts = 1000\n")
        plan = {
            "REQTABLE_TEST_KILLS": " ".join(str(chance.randrange(1, POINTS)) for _ in range(KILLS)),
            "REQTABLE_TEST_WORKERS": str(path / "workers"),
        }
        arguments: dict[str, Any] = {"workers": 1, "handler": "tests/taken_over.py:TakenOver"}
        service = stack.enter_context(
            Service("--config", str(path / "reqtable.toml"), env=os.environ | plan, **arguments)
        )
        talkers = [Talker(stack.enter_context(Client(service.address)), chance) for _ in range(3)]
        for _ in range(ROUNDS):
            asking = [talker.ask() for talker in talkers]
            while asking:
                own = chance.choice(asking)
                try:
                    next(own)
                except StopIteration:
                    asking.remove(own)
        if lost := [each for each in service.lines if "not continued" in each or "given up" in each]:
            raise AssertionError(lost)
        return sum("was killed by SIGKILL" in each for each in service.lines)


def points(quick: bool, seed: int) -> list[str]:
    """SIGKILL workers at points of their work on the journal, successors included, by seeds."""
    found = []
    died = 0
    seeds = 40 if quick else 1000
    for each in range(seed, seed + seeds):
        try:
            died += converse(each)
        except (AssertionError, OSError) as problem:
            found.append(f"seed {each}: {problem!r}")
    print(f"  {seeds} seeds, {died} workers died")
    return found
