"""Handlers and factories of the tests of policy `executor`: a worker process imports this module."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reqtable import LimitExceeded, StateRequestHandler, Transition, call, exactly, line, state, told
from reqtable.http import HTTPRequestHandler


@dataclass
class Tally:
    words: dict[bytes, int] = field(default_factory=dict)


class Shipped(StateRequestHandler):
    """Does what the line says, in whatever process."""

    count: int = 0
    tally: Tally = Tally()

    @state(line(limit=1000), timeout=30)
    def command(self, text: bytes) -> Transition:
        self.count += 1
        verb, _, rest = text.strip().partition(b" ")
        return getattr(self, "do_" + verb.decode())(rest)

    def do_where(self, rest: bytes) -> Transition:
        self.send(b"%d %d\n" % (os.getpid(), self.count))
        return self.command

    def do_count(self, rest: bytes) -> Transition:
        for word in rest.split():
            self.tally.words[word] = self.tally.words.get(word, 0) + 1
        self.send(b"%r\n" % self.tally.words)
        return self.command

    def do_body(self, rest: bytes) -> Transition:
        return self.body, exactly(int(rest))

    @state(timeout=30)
    def body(self, data: bytes) -> Transition:
        self.send(b"%d bytes\n" % len(data))
        return self.command

    def do_call(self, rest: bytes) -> Transition:
        return self.called, call(os.getpid)

    @state()
    def called(self, pid: int) -> Transition:
        self.send(b"called in %d\n" % pid)
        return self.command

    def do_soon(self, rest: bytes) -> Transition:
        return self.soon

    @state(line(), timeout=0.05)
    def soon(self, text: bytes) -> Transition:
        return None

    def on_timeout(self) -> Transition:
        self.send(b"too slow in %d\n" % os.getpid())
        return self.command

    def on_eof(self, partial: bytes) -> Transition:
        self.send(b"bye after %d\n" % self.count)

    def on_limit(self, error: LimitExceeded) -> Transition:
        self.send(b"too long\n")

    def do_fail(self, rest: bytes) -> Transition:
        self.send(b"so far\n")
        raise LookupError("as asked")

    def do_die(self, rest: bytes) -> Transition:
        os.kill(os.getpid(), signal.SIGKILL)

    def do_exit(self, rest: bytes) -> Transition:
        raise SystemExit(3)

    def do_undeclared(self, rest: bytes) -> Transition:
        self.extra = 1
        return self.command

    def do_lock(self, rest: bytes) -> Transition:
        self.count = threading.Lock()  # type: ignore[assignment]
        return self.command

    def do_closure(self, rest: bytes) -> Transition:
        return self.called, call(lambda: 1)

    def do_server(self, rest: bytes) -> Transition:
        self.send(b"%d\n" % len(self.server.table))
        return self.command

    def do_peer(self, rest: bytes) -> Transition:
        self.send(b"%s\n" % self.client_address[0].encode())
        return self.command


class WithFunction(StateRequestHandler):
    key: Any = lambda text: text.lower()

    @state(line())
    def command(self, text: bytes) -> Transition:
        return None


class Recoverer(Shipped):
    def on_error(self, error: Exception) -> Transition:
        self.send(f"recovered from {error}\n".encode())
        return self.command


# -- factories --------------------------------------------------------------------------------------------------------


def threads(**arguments: Any) -> Executor:
    return ThreadPoolExecutor(**arguments)


def nothing() -> None:
    return None


def broken() -> Executor:
    raise RuntimeError("no such cluster")


def dask(address: str) -> Executor:
    """The executor of a cluster that runs already."""
    from distributed import Client

    made: Executor = Client(address).get_executor()
    return made


class Cancelling(Executor):
    """Cancels what it was given, as a Dask client does when its scheduler has gone."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        threading.Timer(0.01, future.cancel).start()
        return future


def shared(pools: list[Executor] = []) -> Executor:  # noqa: B006  # it is shared
    """One pool for all who ask, until somebody shuts it down."""
    if not pools or pools[0]._shutdown:  # type: ignore[attr-defined]
        pools[:] = [ThreadPoolExecutor(1, thread_name_prefix="reqtable-call")]
    return pools[0]


def exits() -> Executor:
    raise SystemExit("a\nb")


def verbose() -> Executor:
    raise ValueError("a\nb\nc")


# -- handlers of regressions ------------------------------------------------------------------------------------------


class Closing(StateRequestHandler):
    """Makes a file when it is closed."""

    path: bytes = b""

    @state(line())
    def command(self, text: bytes) -> Transition:
        if text == b"slow\n":
            time.sleep(0.3)
            return self.command
        self.path = text.strip()
        self.send(b"ok\n")
        return self.command

    def on_close(self) -> None:
        Path(os.fsdecode(self.path)).touch()


class TwoArguments(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)


def raise_awkwardly() -> None:
    raise TwoArguments("first", "second")


class Awkward(StateRequestHandler):
    @state(line())
    def command(self, text: bytes) -> Transition:
        if text == b"call\n":
            return self.never, call(raise_awkwardly, on="process")
        raise TwoArguments("first", "second")

    @state()
    def never(self, _: None) -> None:
        raise AssertionError

    def on_error(self, error: Exception) -> Transition:
        if isinstance(error, TwoArguments):
            raise error
        self.send(f"{type(error).__name__}: {error}\n".encode())
        return self.command


class OnTheLoop(StateRequestHandler):
    @state(line(), dispatch="inline")
    def command(self, text: bytes) -> Transition:
        self.extra = 7
        return self.shipped

    @state()
    def shipped(self, _: None) -> Transition:
        self.send(b"%d\n" % self.extra)
        return self.command


class Deletes(StateRequestHandler):
    value: int

    def start(self) -> Transition:
        self.value = 1
        return self.command

    @state(line())
    def command(self, text: bytes) -> Transition:
        if hasattr(self, "value"):
            self.send(b"there\n")
            del self.value
        else:
            self.send(b"gone\n")
        return self.command


class Web(HTTPRequestHandler):
    """Answers HTTP requests in whatever process."""

    def do_GET(self) -> Transition:
        return self.answer(200, f"{os.getpid()}\n")

    def do_POST(self) -> Transition:
        return self.answer(200, self.request.body)

    def do_DELETE(self) -> Transition:
        raise LookupError("as asked")

    def do_PUT(self) -> Transition:
        return self.waits

    @state(told())
    def waits(self, text: str) -> Transition:
        return self.answer(200, text)
