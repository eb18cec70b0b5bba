"""Helpers that the tests share: servers in a thread, clients, and ways to wait.

Nothing here waits by sleeping. A test waits for the event itself, and pytest-timeout is the backstop.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, AnyStr

import pytest

import reqtable

WAIT_S = 20.0  # how long a test waits for something that must happen


def slow_but(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Return the values of a test's parameter; all but the `quick` values are marked slow (see pyproject.toml).

    A value for several parameters is a tuple.
    """

    def slow(value: Any) -> Any:
        return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)

    return [value if value in quick else slow(value) for value in values]


@contextlib.contextmanager
def echoing(
    clock: Callable[[], float], handler: Any, limits: reqtable.Limits | None = None, dispatch: str | None = None
) -> Iterator[tuple[Any, Callable[..., None]]]:
    """Serve one connection pass by pass. Gives its entry, and a function that sends, runs a pass and receives.

    The function compares what it receives with what it sent, or with `received`; b"": it receives nothing.
    """
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(reqtable.TCPServer(("127.0.0.1", 0), handler, dispatch=dispatch))
        reqtable.Engine(limits=limits, system=reqtable.System(clock=clock)).add(server).loop.open()
        ours, theirs = socket.socketpair()
        stack.enter_context(theirs)
        theirs.settimeout(0)
        server.process_request(ours, ("192.0.2.1", 1))
        (entry,) = server.table

        def line(sent: bytes, received: bytes | None = None) -> None:
            theirs.sendall(sent)
            server.engine.loop.run_once(0)
            if received != b"":
                assert theirs.recv(100_000) == (sent if received is None else received)

        yield entry, line


class Client:
    """Talks to a stream server through a blocking socket. Sends even small data at once."""

    def __init__(self, address: Any, family: int = socket.AF_INET) -> None:
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        self.socket.settimeout(WAIT_S)
        try:
            self.socket.connect(address)
            if family != socket.AF_UNIX:
                self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError:
            self.socket.close()
            raise

    def send(self, data: bytes) -> Client:
        self.socket.sendall(data)
        return self

    def receive(self, count: int) -> bytes:
        """Return exactly `count` bytes, or fewer at the end of file."""
        data = bytearray()
        while len(data) < count and (more := self.socket.recv(min(count - len(data), 262_144))):
            data += more
        return bytes(data)

    def line(self) -> bytes:
        data = b""
        while not data.endswith(b"\n") and (more := self.socket.recv(1)):
            data += more
        return data

    def ask(self, data: bytes) -> bytes:
        """Send a line, and return the line that answers it."""
        return self.send(data).line()

    def rest(self) -> bytes:
        """Return everything up to the end of file."""
        data = bytearray()
        while more := self.socket.recv(262_144):
            data += more
        return bytes(data)

    def end(self) -> Client:
        """Half-close."""
        self.socket.shutdown(socket.SHUT_WR)
        return self

    def reset(self) -> None:
        """Close the connection with a reset instead of an end of file."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.socket.close()

    def hang_up(self) -> None:
        """Shut down the connection and close the socket: forked children may have copies of the descriptor."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


@contextlib.contextmanager
def serving(server: Any, poll_interval: float = 0.5) -> Iterator[Any]:
    """Run `server.serve_forever()` in a thread during the block, and then close the server.

    Raises the exception that `serve_forever` has raised.
    """
    raised: list[BaseException] = []
    begun = threading.Event()

    def run() -> None:
        try:
            server.serve_forever(poll_interval)
        except BaseException as error:
            raised.append(error)
        finally:
            begun.set()

    server.engine.post(begun.set)
    thread = threading.Thread(target=run)
    thread.start()
    assert begun.wait(WAIT_S)
    try:
        yield server
    except BaseException:
        for entry in server.table:  # after a failed test, don't wait for children and threads
            server.table.cancel(entry.id)
        raise
    finally:
        if thread.is_alive():
            server.shutdown()
        thread.join(WAIT_S)
        server.server_close()
    assert not thread.is_alive()
    if raised:
        raise raised[0]


@contextlib.contextmanager
def served(handler: Any, dispatch: str | None = None, **attributes: Any) -> Iterator[Any]:
    """Run a TCP server of `handler` on a free port during the block."""
    made = type("Server", (reqtable.TCPServer,), {"request_queue_size": 1024, **attributes})
    with serving(made(("127.0.0.1", 0), handler, dispatch=dispatch)) as server:
        yield server


def wait_until(server: Any, condition: Callable[[], bool]) -> None:
    """Wait until `condition()` holds, which is checked after each pass of the server's loop."""
    held = threading.Event()

    def look() -> None:
        if condition():
            held.set()
        elif not held.is_set():
            server.engine.loop.mailbox.call_later(look)

    server.engine.post(look)
    assert held.wait(WAIT_S), f"the condition did not hold within {WAIT_S} s"


class Started(subprocess.Popen[AnyStr]):
    """A program that runs during a `with` block, and that is killed if the block fails.

    `with subprocess.Popen(…)` waits for the program instead, for ever if the program is a server.
    """

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            self.kill()
        super().__exit__(kind, error, trace)


def lines_before(last: str, output: IO[str]) -> list[str]:
    """Return the lines of a program's output before the line `last`. The output may not end before that line."""
    lines: list[str] = []
    while (line := output.readline()) != last:
        lines.append(line)
        assert line, f"the output ended without {last!r}: {lines}"
    return lines


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """Yield a port that refuses connections until a server binds it, and that no program gets by chance meanwhile.

    The server must set SO_REUSEADDR, as this holder of the port does. The holder does not listen.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        yield holder.getsockname()[1]


def child_processes() -> set[int]:
    """Return the children of this process, also those that have ended and were not waited for (proc(5))."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # the thread has ended, or this Linux does not tell
            found.update(map(int, (task / "children").read_text().split()))
    return found


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
