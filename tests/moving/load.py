"""The load: a process with all clients, and `Load`, which starts it and asks it for its figures.

The process prints `ready` when each client has had an answer. Each line on its standard input asks for the figures so
far, as a line of JSON; `end` lets each client end its conversation first, and then the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple, Self

from tests.moving.clients import KINDS, Client, Shared
from tests.moving.tally import WAIT_S

ROOT = Path(__file__).parent.parent.parent
CONNECTING = 100  # clients at a time
Figures = dict[str, dict[str, Any]]  # by the kind of the clients


class Group(NamedTuple):
    """Describes the clients of one kind."""

    kind: str
    count: int
    options: dict[str, Any] = {}


class Load:
    """Runs the process while it is entered."""

    def __init__(self, port: int, groups: list[Group], seed: int) -> None:
        self._given = json.dumps({"port": port, "groups": groups, "seed": seed})

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.moving.load", self._given],
            cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            self.__exit__()
            raise SystemExit("the load is not ready: see above")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def figures(self) -> Figures:
        """Return the figures so far. The waits are those since the last call."""
        return self._ask("figures")

    def end(self) -> Figures:
        """Return the figures after each client has ended its conversation."""
        return self._ask("end")

    def _ask(self, what: str) -> Figures:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        text = self._process.stdout.readline()
        if not text:
            raise SystemExit("the load has died: see above")
        found: Figures = json.loads(text)
        return found


async def run(port: int, groups: list[list[Any]], seed: int) -> None:
    over, connecting = asyncio.Event(), asyncio.Semaphore(CONNECTING)
    shared: dict[str, Shared] = {}
    clients: list[Client] = []
    for kind, count, options in groups:
        shared[kind] = Shared(port, over, connecting, options=options)
        clients += [KINDS[kind](shared[kind], f"{kind} {number}", seed) for number in range(count)]
    tasks = [asyncio.create_task(client.run()) for client in clients]
    with contextlib.suppress(TimeoutError):  # the figures say what has failed
        async with asyncio.timeout(2 * WAIT_S):
            await asyncio.gather(*(client.has_begun.wait() for client in clients))
    print("ready", flush=True)
    lines = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while text := await lines.readline():
        if text.strip() == b"end":
            over.set()
            _, late = await asyncio.wait(tasks, timeout=2 * WAIT_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late)
        print(json.dumps({kind: each.tally.figures() for kind, each in shared.items()}), flush=True)
        if text.strip() == b"end":
            return


if __name__ == "__main__":
    asyncio.run(run(**json.loads(sys.argv[1])))
