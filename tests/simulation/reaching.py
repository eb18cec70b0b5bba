"""Handlers that reach out: to upstreams, to each other, and to what becomes of their clients.

Each protocol is there as a state machine and as a coroutine.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, ClassVar

from reqtable import (
    AsyncRequestHandler,
    ConnectFailed,
    StateRequestHandler,
    Transition,
    chunk,
    connect,
    disconnected,
    either,
    end_output,
    line,
    nothing,
    rest,
    sleep,
    state,
    told,
)

PIECE_BYTES = 200  # the most that a forwarder takes at once


# -- forwarding ------------------------------------------------------------------------------------------------------


class Forward(StateRequestHandler):
    """Forwards what its client sends to an upstream, and what the upstream sends to its client."""

    target: ClassVar[str]
    upstream: Any = None
    ends: int = 0

    @state(nothing())
    def begin(self, _: None) -> Transition:
        return self.connected, connect(self.target)

    @state()
    def connected(self, upstream: Any) -> Transition:
        self.upstream = upstream
        return self.copying, either(chunk(PIECE_BYTES), upstream.chunk(PIECE_BYTES))

    @state()
    def copying(self, arrived: Any) -> Transition:
        if not arrived.item:
            self.ends += 1
            if self.ends == 2:
                return None
            if arrived.index == 1:
                return self.copying_on, end_output()
            self.upstream.end_output()
        elif arrived.index == 0:
            self.upstream.send(arrived.item)
        else:
            self.send(arrived.item)
        return self.copying, either(chunk(PIECE_BYTES), self.upstream.chunk(PIECE_BYTES))

    @state()
    def copying_on(self, _: None) -> Transition:
        return self.copying, either(chunk(PIECE_BYTES), self.upstream.chunk(PIECE_BYTES))

    def on_error(self, error: Exception) -> Transition:
        if not isinstance(error, ConnectFailed):
            raise error
        self.send(b"-failed\n")
        return None


class AsyncForward(AsyncRequestHandler):
    """Serves the protocol of `Forward`."""

    target: ClassVar[str]

    async def handle(self) -> None:
        try:
            upstream = await self.read(connect(self.target))
        except ConnectFailed:
            await self.send(b"-failed\n")
            return
        ends = 0
        while ends < 2:
            index, data = await self.read(either(chunk(PIECE_BYTES), upstream.chunk(PIECE_BYTES)))
            if data:
                await (upstream.send(data) if index == 0 else self.send(data))
                continue
            ends += 1
            if index == 0:
                upstream.end_output()
            else:
                await self.read(end_output())


# -- racing ----------------------------------------------------------------------------------------------------------


class Race(StateRequestHandler):
    """Asks the upstream that answers first, for each line of its client. `both KEY` asks both upstreams."""

    targets: ClassVar[tuple[str, str]]
    key: bytes = b""
    tries: int = 0
    first: Any = None
    second: Any = None

    @state(line())
    def ask(self, text: bytes) -> Transition:
        if not text.endswith(b"\n"):
            return None
        self.key, self.tries = text, 0
        if text.startswith(b"both "):
            return self.first_of_both, connect(self.targets[0])
        return self.raced, either(*map(connect, self.targets))

    @state()
    def raced(self, arrived: Any) -> Transition:
        return self.connected(arrived.item)

    @state()
    def connected(self, upstream: Any) -> Transition:
        self.first = upstream
        upstream.send(self.key)
        return self.answered, either(upstream.line(), sleep(20))

    @state()
    def answered(self, arrived: Any) -> Transition:
        self.send(arrived.item if arrived.index == 0 else b"-late\n")
        self.first.close()
        return self.ask

    @state()
    def first_of_both(self, upstream: Any) -> Transition:
        self.first = upstream
        return self.asked_both, connect(self.targets[1])

    @state()
    def asked_both(self, upstream: Any) -> Transition:
        self.second = upstream
        self.first.send(self.key)
        upstream.send(self.key)
        return self.one_of_both, either(self.first.line(), upstream.line())

    @state()
    def one_of_both(self, arrived: Any) -> Transition:
        self.send(arrived.item)
        return self.other_of_both, (self.first, self.second)[1 - arrived.index].line()

    @state()
    def other_of_both(self, text: bytes) -> Transition:
        self.send(text)
        self.first.close()
        self.second.close()
        return self.ask

    def on_error(self, error: Exception) -> Transition:
        if not isinstance(error, ConnectFailed):
            raise error
        if self.key.startswith(b"both ") or self.tries == len(self.targets):
            self.send(b"-failed\n")
            if self.first is not None:
                self.first.close()
            return self.ask
        self.tries += 1
        return self.connected, connect(self.targets[self.tries - 1])


class AsyncRace(AsyncRequestHandler):
    """Serves the protocol of `Race`."""

    targets: ClassVar[tuple[str, str]]

    async def handle(self) -> None:
        while (text := await self.read(line())).endswith(b"\n"):
            try:
                await (self._both(text) if text.startswith(b"both ") else self._one(text))
            except ConnectFailed:
                await self.send(b"-failed\n")

    async def _one(self, text: bytes) -> None:
        upstream = await self._connected()
        await upstream.send(text)
        index, answer = await self.read(either(upstream.line(), sleep(20)))
        await self.send(answer if index == 0 else b"-late\n")
        upstream.close()

    async def _connected(self) -> Any:
        try:
            return (await self.read(either(*map(connect, self.targets)))).item
        except ConnectFailed:
            pass
        try:
            return await self.read(connect(self.targets[0]))
        except ConnectFailed:
            return await self.read(connect(self.targets[1]))

    async def _both(self, text: bytes) -> None:
        first = await self.read(connect(self.targets[0]))
        try:
            second = await self.read(connect(self.targets[1]))
        except ConnectFailed:
            first.close()
            raise
        await first.send(text)
        await second.send(text)
        index, answer = await self.read(either(first.line(), second.line()))
        await self.send(answer)
        await self.send(await self.read((first, second)[1 - index].line()))
        first.close()
        second.close()


# -- telling each other ----------------------------------------------------------------------------------------------


class Room:
    """Notes what requests have told each other, and checks that none of it is lost, repeated or late."""

    def __init__(self, clock: Any) -> None:
        self.clock = clock
        self.members: dict[bytes, Any] = {}
        self.taken: dict[bytes, list[bytes]] = defaultdict(list)  # what each member was told, and `tell` took
        self.heard: dict[bytes, list[bytes]] = defaultdict(list)
        self.times: dict[bytes, float] = {}  # when each item was told
        self.latest_s = 0.0  # after how long an item was heard, at most

    def join(self, name: bytes, handler: Any) -> None:
        self.members[name] = handler

    def tell(self, name: bytes, text: bytes) -> bytes:
        other = self.members.get(name)
        if other is None:
            return b"nobody\n"
        self.times[text] = self.clock()
        self.taken[name].append(text)  # before `tell`: it may be heard at once
        if other.tell(text):
            return b"taken\n"
        assert self.taken[name].pop() == text
        return b"refused\n"

    def hear(self, name: bytes, text: bytes) -> bytes:
        heard = self.heard[name]
        heard.append(text)
        assert heard == self.taken[name][: len(heard)], f"{name!r} heard {heard}, and was told {self.taken[name]}"
        self.latest_s = max(self.latest_s, self.clock() - self.times[text])
        return b"told %b\n" % text

    def leave(self, name: bytes) -> None:
        self.members.pop(name, None)


class Publish(StateRequestHandler):
    """Tells other clients what its own client says: `NAME TEXT`. The first line is the client's own name."""

    room: ClassVar[Room]
    name: bytes = b""

    @state(line())
    def hello(self, text: bytes) -> Transition:
        if not text.endswith(b"\n"):
            return None
        self.name = text.strip()
        self.room.join(self.name, self)
        self.send(b"hello\n")
        return self.heard, either(line(), told())

    @state()
    def heard(self, arrived: Any) -> Transition:
        if arrived.index == 1:
            self.send(self.room.hear(self.name, arrived.item))
        elif arrived.item in (b"", b"bye\n"):
            return None
        else:
            name, _, text = arrived.item.strip().partition(b" ")
            self.send(self.room.tell(name, text))
        return self.heard, either(line(), told())

    def on_close(self) -> None:
        self.room.leave(self.name)


class AsyncPublish(AsyncRequestHandler):
    """Serves the protocol of `Publish`."""

    room: ClassVar[Room]
    name: bytes = b""

    async def handle(self) -> None:
        text = await self.read(line())
        if not text.endswith(b"\n"):
            return
        self.name = text.strip()
        self.room.join(self.name, self)
        await self.send(b"hello\n")
        while True:
            index, item = await self.read(either(told(), line()))
            if index == 0:
                await self.send(self.room.hear(self.name, item))
            elif item in (b"", b"bye\n"):
                return
            else:
                name, _, text = item.strip().partition(b" ")
                await self.send(self.room.tell(name, text))

    def on_close(self) -> None:
        self.room.leave(self.name)


# -- a client that may leave -----------------------------------------------------------------------------------------


class Patient(StateRequestHandler):
    """Asks its upstream for its client, and stops asking when the client has gone."""

    target: ClassVar[str]
    text: bytes = b""
    upstream: Any = None

    @state(line())
    def ask(self, text: bytes) -> Transition:
        self.text = text
        return self.connected, either(connect(self.target), disconnected())

    @state()
    def connected(self, arrived: Any) -> Transition:
        if arrived.index == 1:
            return None
        self.upstream = arrived.item
        self.upstream.send(self.text)
        return self.answered, either(self.upstream.line(), disconnected())

    @state()
    def answered(self, arrived: Any) -> Transition:
        if arrived.index == 0:
            self.send(arrived.item)
        return None

    def on_error(self, error: Exception) -> Transition:
        if not isinstance(error, ConnectFailed):
            raise error
        self.send(b"-failed\n")
        return None


class AsyncPatient(AsyncRequestHandler):
    """Serves the protocol of `Patient`."""

    target: ClassVar[str]

    async def handle(self) -> None:
        text = await self.read(line())
        try:
            index, upstream = await self.read(either(disconnected(), connect(self.target)))
        except ConnectFailed:
            await self.send(b"-failed\n")
            return
        if index == 0:
            return
        await upstream.send(text)
        index, answer = await self.read(either(disconnected(), upstream.line()))
        if index == 1:
            await self.send(answer)


# -- connections that are kept ---------------------------------------------------------------------------------------


class Keep(StateRequestHandler):
    """Asks its upstream for each line of its client, on a connection that is kept for the next line of any client."""

    target: ClassVar[str]
    text: bytes = b""
    upstream: Any = None
    tries: int = 0

    @state(line())
    def ask(self, text: bytes) -> Transition:
        if not text.endswith(b"\n"):
            return None
        self.text, self.tries = text, 0
        return self.connected, connect(self.target, reuse=True)

    @state()
    def connected(self, upstream: Any) -> Transition:
        self.upstream = upstream
        upstream.send(self.text)
        return self.answered, upstream.line()

    @state()
    def answered(self, answer: bytes) -> Transition:
        if not answer.endswith(b"\n"):
            self.upstream.close()
            return self.again(BrokenPipeError("the upstream has ended"))
        self.send(answer)
        self.upstream.release()
        return self.ask

    def again(self, error: Exception) -> Transition:
        """Ask once more: the upstream may have ended a kept connection just before it was used."""
        self.tries += 1
        if self.tries > 3 or isinstance(error, ConnectFailed):
            self.send(b"-failed\n")
            return self.ask
        return self.connected, connect(self.target, reuse=self.tries < 3)

    def on_error(self, error: Exception) -> Transition:
        if not isinstance(error, ConnectFailed | ConnectionError):
            raise error
        return self.again(error)


class AsyncKeep(AsyncRequestHandler):
    """Serves the protocol of `Keep`."""

    target: ClassVar[str]

    async def handle(self) -> None:
        while (text := await self.read(line())).endswith(b"\n"):
            for reuse in (True, True, True, False):
                try:
                    answer = await self._ask(text, reuse)
                except ConnectFailed:
                    answer = b""
                    break
                except ConnectionError:
                    continue
                if answer.endswith(b"\n"):
                    break
            await self.send(answer if answer.endswith(b"\n") else b"-failed\n")

    async def _ask(self, text: bytes, reuse: bool) -> bytes:
        upstream = await self.read(connect(self.target, reuse=reuse))
        await upstream.send(text)
        answer = await self.read(upstream.line())
        if answer.endswith(b"\n"):
            upstream.release()
        else:
            upstream.close()
        return answer


# -- the last output -------------------------------------------------------------------------------------------------


class Deliver(StateRequestHandler):
    """Sends what its client has sent to its upstream, and is done at once: it does not wait until that has arrived."""

    target: ClassVar[str]
    data: bytes = b""

    @state(rest(1_000_000))
    def receive(self, data: bytes) -> Transition:
        self.data = data
        return self.deliver, connect(self.target)

    @state()
    def deliver(self, upstream: Any) -> Transition:
        upstream.send(self.data)
        self.send(b"on its way\n")
        return None

    def on_error(self, error: Exception) -> Transition:
        if not isinstance(error, ConnectFailed):
            raise error
        self.send(b"-failed\n")
        return None


class AsyncDeliver(AsyncRequestHandler):
    """Serves the protocol of `Deliver`."""

    target: ClassVar[str]

    async def handle(self) -> None:
        data = await self.read(rest(1_000_000))
        try:
            upstream = await self.read(connect(self.target))
        except ConnectFailed:
            await self.send(b"-failed\n")
            return
        for begin in range(0, len(data), 10_000):
            await upstream.send(data[begin : begin + 10_000])
        await self.send(b"on its way\n")


# -- datagrams -------------------------------------------------------------------------------------------------------


class Resolve(StateRequestHandler):
    """Asks an upstream by datagrams, for each line of its client, and asks again if no answer comes."""

    target: ClassVar[str]
    text: bytes = b""
    upstream: Any = None
    tries: int = 0

    @state(line())
    def ask(self, text: bytes) -> Transition:
        if not text.endswith(b"\n"):
            return None
        self.text, self.tries = text, 0
        return self.connected, connect(self.target)

    @state()
    def connected(self, upstream: Any) -> Transition:
        self.upstream = upstream
        upstream.send(self.text)
        return self.answered, either(upstream.datagram(), sleep(1))

    @state()
    def answered(self, arrived: Any) -> Transition:
        if arrived.index == 1 and self.tries < 6:
            self.tries += 1
            self.upstream.send(self.text)
            return self.answered, either(self.upstream.datagram(), sleep(1))
        self.send(arrived.item if arrived.index == 0 else b"-late\n")
        self.upstream.close()
        return self.ask

    def on_error(self, error: Exception) -> Transition:
        if not isinstance(error, ConnectFailed | ConnectionRefusedError):
            raise error
        self.send(b"-failed\n")
        return self.ask


class AsyncResolve(AsyncRequestHandler):
    """Serves the protocol of `Resolve`."""

    target: ClassVar[str]

    async def handle(self) -> None:
        while (text := await self.read(line())).endswith(b"\n"):
            try:
                await self.send(await self._ask(text))
            except (ConnectFailed, ConnectionRefusedError):
                await self.send(b"-failed\n")

    async def _ask(self, text: bytes) -> bytes:
        upstream = await self.read(connect(self.target))
        try:
            for _ in range(7):
                await upstream.send(text)
                index, answer = await self.read(either(upstream.datagram(), sleep(1)))
                if index == 0:
                    return answer
            return b"-late\n"
        finally:
            upstream.close()
