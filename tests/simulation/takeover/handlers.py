"""The handler of the simulated crashes."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import reqtable
from reqtable import either, exactly, line, sleep, state
from tests.simulation.handlers import blob
from tests.simulation.takeover.kernel import MortalNetwork

PATIENCE_S = 900


class Counting(reqtable.StateRequestHandler):
    """Answers lines. Fields change with `add`, not with `echo`; each answer to `add` shows all that came before."""

    network: ClassVar[MortalNetwork]
    crashes: ClassVar[Counter[Any]]

    count: int = 0
    shown: bytes = b""  # the last four numbers

    @state(line(), timeout=PATIENCE_S)
    def ask(self, text: bytes) -> Any:
        if not text.endswith(b"\n"):
            return None
        verb, *words = text.split()
        return getattr(self, f"_{verb.decode()}")(*words)

    def _add(self, number: bytes) -> Any:
        self.count += 1
        self.shown = b" ".join([*self.shown.split(), number][-4:])
        self.send(b"%d %b\n" % (self.count, self.shown))
        return self.ask

    def _echo(self, word: bytes) -> Any:
        self.send(b"%b\n" % word)
        return self.ask

    def _still(self, word: bytes) -> Any:
        return self.ask

    def _big(self, count: bytes) -> Any:
        self.send(blob(int(count)) + b"\n")
        return self.ask

    def _parts(self, count: bytes) -> Any:
        for number in range(int(count)):
            self.send(b"part %d\n" % number)
        return self.ask

    def _nap(self, tenths: bytes) -> Any:
        self.send(b"sleeping\n")
        return self.awake, sleep(int(tenths) / 10)

    @state()
    def awake(self, _: None) -> Any:
        return self._add(b"awake")

    def _wait(self, tenths: bytes) -> Any:
        self.send(blob(150))
        return self.waited, either(line(), sleep(int(tenths) / 10))

    @state(timeout=PATIENCE_S)
    def waited(self, arrived: Any) -> Any:
        if arrived.index == 1:
            return self._echo(b"waited")
        return self.ask(arrived.item)

    def _take(self, count: bytes) -> Any:
        return self.taken, exactly(int(count))

    @state(timeout=PATIENCE_S)
    def taken(self, data: bytes) -> Any:
        return self._add(b"%d" % sum(data))

    def _crash(self, times: bytes) -> Any:
        if self.entry.attempt < int(times):
            self.crashes[self.entry.peer] += 1
            self.network.die("by a step")
        self.send(b"survived\n")
        return self.ask

    def _bye(self) -> Any:
        self.send(b"bye\n")
        return None

    def on_eof(self, partial: bytes) -> Any:
        if partial:
            self.send(b"partial %b\n" % partial)
        return None
