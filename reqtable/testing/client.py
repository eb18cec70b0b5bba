"""`Client` is the script of one client. `Peer` plays a script on a simulated network."""

from __future__ import annotations

import inspect
import socket
from collections.abc import Callable, Generator, Iterator
from math import inf
from typing import Any, Self

from reqtable.testing.datagrams import DatagramEnd
from reqtable.testing.kernel import StreamEnd
from reqtable.testing.network import SimNetwork

# A script yields a condition to wait for, and the longest wait in seconds (None: no limit).
Waits = Generator[tuple[Callable[[], bool], float | None], None, None]


class Client:
    """Collects the steps of a client: sends, expectations, pauses, ends. Calls can be chained; a script can be reused.

        Client().send(b"put 5\\n").pause(3).send(b"a b c").send(b"count\\n").expect(b"3\\n").end().expect_end()

    Each step begins when the previous step is done. The client closes its connection at the end of the script. With a
    datagram server, each `send` sends one datagram and each `expect` takes one. An argument that a step can't use
    raises TypeError or ValueError.
    """

    def __init__(self) -> None:
        self.steps: list[tuple[str, tuple[Any, ...]]] = []

    def send(self, data: bytes) -> Self:
        """Send all of `data`, however slowly the server reads."""
        return self._add("send", as_bytes("send", data))

    def expect(self, data: bytes) -> Self:
        """Wait until the next bytes have arrived; they must be exactly `data`."""
        return self._add("expect", as_bytes("expect", data))

    def expect_end(self) -> Self:
        """Wait for the end of file; nothing more may arrive before it."""
        return self._add("expect_end")

    def take_rest(self) -> Self:
        """Accept whatever arrives, up to the end of file or a reset."""
        return self._add("take_rest")

    def pause(self, seconds: float) -> Self:
        """Let time pass; the client goes on reading."""
        return self._add("pause", as_seconds("pause", seconds))

    def read_nothing(self, seconds: float | None = None) -> Self:
        """Stop reading for `seconds`, or until `read_on()` or the next expectation. The script goes on at once."""
        return self._add("read_nothing", None if seconds is None else as_seconds("read_nothing", seconds))

    def read_on(self) -> Self:
        """Resume reading."""
        return self._add("read_on")

    def end(self) -> Self:
        """Half-close: the server sees the end of file, and its answers still arrive."""
        return self._add("end")

    def reset(self) -> Self:
        """Reset the connection."""
        return self._add("reset")

    def may_fail(self) -> Self:
        """From here on, let an unmet expectation end the script without failing: another client may interfere."""
        return self._add("may_fail")

    def then(self, play: Callable[[Peer], Iterator[Any]]) -> Self:
        """Run a generator function of the `Peer`, which waits by `yield from peer.receive()` or `peer.send(data)`."""
        if not inspect.isgeneratorfunction(inspect.unwrap(play) if callable(play) else play):
            raise TypeError(f"then() takes a generator function of a Peer, not {play!r}: it waits by `yield from`")
        return self._add("then", play)

    def _add(self, name: str, *args: Any) -> Self:
        self.steps.append((name, args))
        return self

    def __repr__(self) -> str:
        return "Client()" + "".join(f".{name}({', '.join(map(_short, args))})" for name, args in self.steps)


def as_bytes(what: str, data: Any) -> bytes:
    """Return the bytes that a script is to send or to expect. Raises TypeError."""
    if not isinstance(data, bytes | bytearray | memoryview):
        raise TypeError(f"{what}() takes bytes, not {type(data).__name__}: {_short(data)}")
    return bytes(data)


def as_seconds(what: str, seconds: Any) -> float:
    """Return how long a script is to wait. Raises ValueError."""
    if not isinstance(seconds, int | float) or not 0 <= seconds < inf:
        raise ValueError(f"{what}() takes seconds, 0 or more, not {seconds!r}")
    return seconds


def _short(value: Any) -> str:
    text = getattr(value, "__qualname__", None) or repr(value)  # a function's repr has its address
    return text if len(text) <= 60 else f"{text[:56]}…{text[-1]}"


_ENDS = {"": "", "end": ": the connection was ended", "reset": ": it was reset", "refused": ": nobody listens"}


class Unmet(AssertionError):
    """Raised when a client did not find what it expected."""


class Peer:
    """Plays the script of one client on a simulated network. `received` holds everything that the client has read.

    The class has many methods, because each step of a script has one (`_do_*`).
    """

    def __init__(self, network: SimNetwork, number: int, script: Client) -> None:
        self.network = network
        self.number = number
        self.script = script
        self.address: Any = (f"198.51.100.{number % 254 + 1}", 50_000 + number)
        self.received = b""
        self.datagrams: list[bytes] = []  # the same, one by one, if the server is a datagram server
        self.ended = ""  # "end", "reset" (by either) or "refused"
        self.is_done = False
        self.unmet = ""  # the expectation that was not met
        self.waits_for = ""
        self.may_fail = False
        self._end: StreamEnd | DatagramEnd | None = None
        self._expected = 0  # bytes or datagrams that were expected or taken
        self._reads = True
        self._silences = 0  # how often the client has stopped reading
        self._play: Waits | None = None
        self._condition: Callable[[], bool] = lambda: True
        self._wait = 0
        self._call: Any = None  # the last call of a generator function (see `Client.then`)

    def __repr__(self) -> str:
        return f"client {self.number}"

    @property
    def was_hit(self) -> bool:
        """Whether a fault that a client can notice has hit this client."""
        return self.network.was_stalled or (self._end is not None and self._end.was_hit)

    def connect(self, address: Any, kind: int, family: int) -> None:
        """Connect, and begin to play the script."""
        is_unix = family == getattr(socket, "AF_UNIX", None)
        if is_unix:
            self.address = f"client {self.number}" if kind == socket.SOCK_DGRAM else ""
        elif family == socket.AF_INET6:
            self.address = (f"2001:db8::{self.number + 1:x}", 50_000 + self.number, 0, 0)
        if kind == socket.SOCK_DGRAM:
            end = DatagramEnd(self.network, f"d{self.number}", is_unix, False)
            end.descriptors = 1
            end.bind(self.address)
            self._server = address
            self._connected(end)
        else:
            self.network.connect(address, self.address, self._connected)

    def _connected(self, end: StreamEnd | DatagramEnd | None) -> None:
        self._end = end
        if end is None:
            self.ended = "refused"
        else:
            if isinstance(end, StreamEnd):
                end.descriptors = 1
            end.on_change = self._changed
        self._play = self._run()
        self._go_on()

    def _run(self) -> Waits:
        for name, args in self.script.steps:
            self.waits_for = f"{name}({', '.join(map(_short, args))})"
            yield from getattr(self, f"_do_{name}")(*args)

    def _changed(self) -> None:
        self._read()
        if self._play is not None and self._condition():
            self._go_on()

    def _go_on(self) -> None:
        """Play on until the script has to wait."""
        assert self._play is not None
        self._wait += 1
        while True:
            try:
                self._condition, timeout = next(self._play)
            except StopIteration:
                break
            except Unmet as error:
                self.unmet = str(error)
                break
            except Exception as error:  # raised by a generator function (see `Client.then`)
                what = "" if isinstance(error, AssertionError) and str(error) else f"{type(error).__name__} in "
                self.unmet = f"{what}{self.waits_for}: {error}"
                break
            self._wait += 1
            if timeout is not None:
                self.network.after(timeout, self._timed_out, self._wait)
            if not self._condition():
                return
        self._be_done()

    def _be_done(self) -> None:
        self._play = None
        self.is_done = True
        self.network.note(f"{self} is done{': ' + self.unmet if self.unmet else ''}")
        if self._end is not None:
            self._end.descriptors = 0
            self._end.close()

    def give_up(self) -> None:
        """End the script: nothing more will ever arrive."""
        if not self.is_done:
            self.unmet = f"{self.waits_for}: nothing will ever come; it found {self.unexpected!r}"
            self._be_done()

    def _timed_out(self, wait: int) -> None:
        if wait == self._wait and self._play is not None:
            self._go_on()

    def _read(self) -> None:
        """Read everything that has arrived, unless the client has stopped reading."""
        end = self._end
        while self._reads and isinstance(end, DatagramEnd) and end.queue:
            self.datagrams.append(end.queue.popleft()[0])
            self.received += self.datagrams[-1]
        if isinstance(end, StreamEnd) and self._reads and not self.ended:
            try:
                while data := end.recv(65_536):
                    self.received += data
                self.ended = "end"
            except BlockingIOError:
                pass
            except OSError:
                self.ended = "reset"

    def _resume_reading(self, silence: int) -> None:
        if silence == self._silences:
            self._reads = True
            self._changed()

    def _read_on(self) -> None:
        self._reads = True
        self._read()

    @property
    def unexpected(self) -> Any:
        """Input that was read and not yet expected: bytes, or a list of datagrams."""
        if isinstance(self._end, DatagramEnd):
            return self.datagrams[self._expected :]
        return self.received[self._expected :]

    # -- for scripts --------------------------------------------------------------------------------------------------

    def receive(self, timeout_s: float | None = None) -> Generator[Any, None, bytes | None]:
        """Return the next datagram, or all bytes that have arrived, at least one.

        Returns None at the end of file, or when nothing has arrived within `timeout_s` seconds (None: no limit).
        `ended` tells the two apart.
        """
        self._must_have_begun()
        call = self._call = self._receive(None if timeout_s is None else as_seconds("receive", timeout_s))
        return call

    def send(self, data: bytes) -> Waits:
        """Send all of `data`."""
        self._must_have_begun()
        call = self._call = self._send(as_bytes("send", data))
        return call

    def _must_have_begun(self) -> None:
        """Raise Unmet if the last call lacked its `yield from`: such a call does nothing."""
        if self._call is not None and inspect.getgeneratorstate(self._call) == inspect.GEN_CREATED:
            name = self._call.__name__.strip("_")
            raise Unmet(f"a script called peer.{name}() and did not wait for it: `yield from peer.{name}(…)`")

    def _receive(self, timeout_s: float | None) -> Generator[Any, None, bytes | None]:
        self._read_on()
        yield lambda: bool(self.unexpected or self.ended), timeout_s
        there = self.unexpected
        if not there:
            return None
        self._expected += 1 if isinstance(there, list) else len(there)
        return there[0] if isinstance(there, list) else there  # type: ignore[no-any-return]

    def _send(self, data: bytes) -> Waits:
        end = self._end
        if isinstance(end, DatagramEnd):
            end.sendto(data, self._server)
            return
        view = memoryview(data)
        while view:
            if not isinstance(end, StreamEnd) or self.ended in ("reset", "refused"):
                raise Unmet(f"{_short(data)} can't be sent{self._said_end()}")
            try:
                view = view[end.send(view) :]
            except BlockingIOError:
                yield self._can_send, None
            except OSError:
                self.ended = "reset"

    def read_nothing(self, seconds: float | None = None) -> None:
        """Stop reading for `seconds`, or until the next `receive` or expectation."""
        self._reads = False
        self._silences += 1
        if seconds is not None:
            self.network.after(seconds, self._resume_reading, self._silences)

    def end(self) -> None:
        """Half-close, as `Client.end` does."""
        if isinstance(self._end, StreamEnd) and not self._end.is_broken:
            self._end.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Reset the connection."""
        if isinstance(self._end, StreamEnd) and not self._end.is_broken:
            self._end.abort()
        self.ended = "reset"

    def _can_send(self) -> bool:
        end = self._end
        return isinstance(end, StreamEnd) and (end.room > 0 or end.is_broken or end.other.is_closed)

    # -- the steps ----------------------------------------------------------------------------------------------------

    def _do_send(self, data: bytes) -> Waits:
        yield from self._send(data)

    def _do_then(self, play: Callable[[Peer], Waits]) -> Waits:
        yield from play(self)
        self._must_have_begun()

    def _do_pause(self, seconds: float) -> Waits:
        yield lambda: False, seconds

    def _do_expect(self, data: bytes) -> Waits:
        self._read_on()
        if isinstance(self._end, DatagramEnd):
            yield lambda: bool(self.unexpected), None
            found = self.unexpected[0]
            self._expected += 1
            if found != data:
                raise Unmet(f"expected {_short(data)}, found {_short(found)}")
            return
        wanted = len(data)
        yield (
            lambda: bool(self.ended) or not data.startswith(self.unexpected[:wanted]) or len(self.unexpected) >= wanted,
            None,
        )
        found = self.unexpected[:wanted]
        if found != data:
            raise Unmet(f"expected {_short(data)}, found {_short(found)}{self._said_end()}")
        self._expected += wanted

    def _do_expect_end(self) -> Waits:
        if isinstance(self._end, DatagramEnd):
            raise Unmet("datagrams have no end to be expected: expect the last one, and end the script")
        self._read_on()
        yield lambda: bool(self.ended or self.unexpected), None
        if self.unexpected or self.ended != "end":
            raise Unmet(f"expected the end, found {_short(self.unexpected)}{self._said_end()}")

    def _do_take_rest(self) -> Waits:
        self._read_on()
        yield lambda: bool(self.ended), None
        self._expected = len(self.received)

    def _do_read_nothing(self, seconds: float | None) -> Waits:
        self.read_nothing(seconds)
        return
        yield

    def _do_read_on(self) -> Waits:
        self._read_on()
        return
        yield

    def _do_may_fail(self) -> Waits:
        self.may_fail = True
        return
        yield

    def _do_end(self) -> Waits:
        self.end()
        return
        yield

    def _do_reset(self) -> Waits:
        self.reset()
        return
        yield

    def _said_end(self) -> str:
        return _ENDS[self.ended]
