"""A model of the cluster, for as many workers as this machine does not have.

    python -m examples.cluster.simulated

prints how many requests a second a server answers, and how long they take, with 1 to 64 workers. The server is the real
one. Its network, its clock and its cluster are simulated: see `reqtable.testing.simulate`.
"""

import argparse
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple

from examples.cluster.stamps import Stamps
from reqtable import TCPServer
from reqtable.testing import Client, Faults, simulate

_LINE = b"mint 1 a\n"  # takes no time of this machine: the model says how long it takes


class Costs(NamedTuple):
    """Says what a task takes, in seconds."""

    work: float  # of a worker
    scheduling: float  # of the scheduler, which schedules one task at a time


class Result(NamedTuple):
    """Says what the clients have seen."""

    workers: int
    per_s: float
    p50_s: float
    p99_s: float


class SimulatedCluster(Executor):
    """Runs a task on the next free of some workers, after the scheduler has had it."""

    def __init__(self, workers: int, costs: Costs, after: Callable[..., None]) -> None:
        self._free = workers
        self._costs = costs
        self._after = after
        self._scheduling: deque[Callable[[], None]] = deque()  # the first one is being scheduled
        self._waiting: deque[Callable[[], None]] = deque()  # for a worker

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def finish() -> None:
            if future.set_running_or_notify_cancel():
                future.set_result(fn(*args, **kwargs))

        self._scheduling.append(finish)
        if len(self._scheduling) == 1:
            self._after(self._costs.scheduling, self._scheduled)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Do nothing: the simulation ends when no request is left."""

    def _scheduled(self) -> None:
        self._waiting.append(self._scheduling.popleft())
        if self._scheduling:
            self._after(self._costs.scheduling, self._scheduled)
        self._begin()

    def _begin(self) -> None:
        if self._free and self._waiting:
            self._free -= 1
            self._after(self._costs.work, self._done, self._waiting.popleft())

    def _done(self, finish: Callable[[], None]) -> None:
        finish()
        self._free += 1
        self._begin()


def measure(workers: int, costs: Costs, clients: int, each: int) -> Result:
    """Simulate clients that ask `each` times, one question after the other, and return what they have seen."""
    asked: list[tuple[float, float]] = []  # when, and when the answer was there

    def ask(peer: Any) -> Iterator[Any]:
        for _ in range(each):
            began = peer.network.clock.now
            yield from peer.send(_LINE)
            yield from peer.receive()
            asked.append((began, peer.network.clock.now))

    simulate(
        lambda: TCPServer(("127.0.0.1", 0), Stamps),
        [Client().then(ask) for _ in range(clients)],
        faults=Faults.none(),
        passes_max=1_000_000,
        executor=lambda after: SimulatedCluster(workers, costs, after),
    )
    took = sorted(answered - began for began, answered in asked)
    whole_s = max(answered for _, answered in asked) - min(began for began, _ in asked)
    return Result(workers, len(took) / whole_s, took[len(took) // 2], took[len(took) * 99 // 100])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.cluster.simulated")
    parser.add_argument("--work-ms", type=float, default=60.0, help="what a task takes a worker; 60")
    parser.add_argument("--scheduling-ms", type=float, default=1.0, help="what a task takes the scheduler; 1")
    parser.add_argument("--clients", type=int, default=128, help="how many clients ask at the same time; 128")
    parser.add_argument("--each", type=int, default=20, help="how often each client asks; 20")
    given = parser.parse_args()
    costs = Costs(given.work_ms / 1000, given.scheduling_ms / 1000)
    print(f"{'workers':>7}  {'per s':>7}  {'p50 ms':>7}  {'p99 ms':>7}")
    for workers in (1, 2, 4, 8, 16, 32, 64):
        found = measure(workers, costs, given.clients, given.each)
        print(f"{workers:>7}  {found.per_s:>7.1f}  {found.p50_s * 1000:>7.0f}  {found.p99_s * 1000:>7.0f}", flush=True)


if __name__ == "__main__":
    main()
