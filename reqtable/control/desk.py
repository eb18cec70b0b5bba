"""`Desk`: a worker's side of the control API. It runs what the supervisor asks, and sends the batches back.

The supervisor sends `[number, "ask", operation, arguments]`, then `[number, "pull"]` for each batch that it wants, and
`[number, "close"]`. The worker answers a pull with `[number, "batch", batch]`, with `[number, "end"]`, or with
`[number, "failed", kind, text]`. The last words of a worker are `[0, "last", figures]`: nothing is lost of its metrics.
"""

from __future__ import annotations

import socket
from typing import Any

from reqtable.control.jobs import END, Failed, Job
from reqtable.control.line import Line
from reqtable.control.metrics import last_figures_of
from reqtable.control.operations import Target
from reqtable.control.source import OwnSource

LAST_WORDS_S = 1.0  # how long a worker waits at its end for its supervisor to listen


class Desk:
    """Answers the supervisor for the engine of a worker."""

    def __init__(self, target: Target, own: socket.socket) -> None:
        self._target = target
        self._source = OwnSource(target)
        self._jobs: dict[int, Job] = {}
        self.line = Line(target.engine.loop.poller, own, self._hear, self._forget_all)

    def say_last(self) -> None:
        """Tell the supervisor the figures of a worker that has served its requests, and hang up."""
        figures = last_figures_of(self._target.engine, self._target.operator)
        self.line.say_last([0, "last", figures], LAST_WORDS_S)

    def _hear(self, message: list[Any]) -> None:
        number, verb, *rest = message
        if verb == "ask":
            self._jobs[number] = self._source.ask(*rest)
        elif verb == "pull" and number in self._jobs:
            self._jobs[number].pull(lambda batch: self._answer(number, batch))
        elif verb == "close" and number in self._jobs:
            self._jobs.pop(number).close()

    def _answer(self, number: int, batch: Any) -> None:
        if batch is END:
            self._jobs.pop(number, None)
            self.line.say([number, "end"])
        elif isinstance(batch, Failed):
            self._jobs.pop(number, None)
            self.line.say([number, "failed", type(batch.error).__name__, str(batch.error)])
        else:
            self.line.say([number, "batch", batch])

    def _forget_all(self) -> None:
        for job in self._jobs.values():
            job.close()
        self._jobs.clear()
