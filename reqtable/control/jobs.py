"""Jobs: work for an operator that the loop does in slices, so that no client notices.

An operation is a generator. It yields a batch, which is plain data; PAUSE, at which the loop may go on with its
requests; or WAIT, at which it waits for `Job.wake`. It asks `job.is_spent` often enough, and pauses when that is true.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

SLICE_S = 0.0005  # how long a slice may hold the loop
END = None  # what follows the last batch

PAUSE = object()
WAIT = object()

Post = Callable[..., Any]
Then = Callable[[Any], Any]


class Turns:
    """Runs jobs in turn. All of them together hold the loop for one slice in each pass, however many there are."""

    def __init__(self, post: Post) -> None:
        self._post = post
        self._waiting: deque[Job] = deque()
        self._is_posted = False

    def add(self, job: Job) -> None:
        """Run a slice of `job` in a later pass, after the jobs that wait already."""
        self._waiting.append(job)
        self._post_once()

    def _post_once(self) -> None:
        if not self._is_posted:
            self._is_posted = True
            self._post(self._run)

    def _run(self) -> None:
        self._is_posted = False
        spent_at = perf_counter() + SLICE_S
        for _ in range(len(self._waiting)):
            self._waiting.popleft().run(spent_at)
            if perf_counter() >= spent_at:
                break
        if self._waiting:
            self._post_once()


class Job:
    """Runs an operation, at most one slice in each pass of the loop, while somebody waits for its next batch."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._batches: Iterator[Any] = iter(())
        self._then: Then | None = None
        self._is_waiting = False
        self._spent_at = 0.0

    def begin(self, batches: Iterator[Any]) -> Job:
        """Begin with what an operation yields. Returns the job."""
        self._batches = batches
        return self

    @property
    def is_spent(self) -> bool:
        """Whether this slice has lasted as long as it may."""
        return perf_counter() >= self._spent_at

    def pull(self, then: Then) -> None:
        """Call `then(batch)` in a later pass, with the next batch; END if there is none. Raises what the job raises."""
        self._then = then
        self.wake()

    def wake(self) -> None:
        """Go on, if a batch is waited for: there may be one now. For the loop's own thread only."""
        if self._then is not None and not self._is_waiting:
            self._is_waiting = True
            self._turns.add(self)

    def close(self) -> None:
        """End the job: nobody waits for its batches any more."""
        self._then = None
        batches, self._batches = self._batches, iter(())
        close = getattr(batches, "close", None)
        if close is not None:
            close()

    def run(self, spent_at: float) -> None:
        """Run until there is a batch, or until `spent_at`."""
        self._is_waiting = False
        then = self._then
        if then is None:
            return
        self._spent_at = spent_at
        try:
            batch = next(self._batches, END)
        except Exception as error:
            batch = Failed(error)
        if batch is PAUSE:
            self.wake()
        elif batch is not WAIT:
            self._then = None
            then(batch)


class Failed:
    """Stands in for a batch: the operation has raised `error`."""

    def __init__(self, error: Exception) -> None:
        self.error = error
