"""The servers of `servers` that talk to more than one peer: forwarders, and a publisher's servers.

A forwarder connects to `upstream` on this machine for each client, and passes on what comes from either side, until
both sides have ended. A publisher's server sends each line to all subscribers. A line that begins with "s" makes its
client a subscriber, and is sent back.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

HOST = "127.0.0.1"
ANYWHERE = (HOST, 0)
QUEUE = 1024
LARGE_BYTES = 2**18
WAITING_MAX = 64  # messages for one subscriber

upstream = 0  # the port that the forwarders connect to
read_bytes = 2**16  # how much they read at once; reqtable's own default


# -- reqtable ---------------------------------------------------------------------------------------------------------


def reqtable_forward(style: str) -> Any:
    import reqtable
    from reqtable import chunk, connect, either, state

    address = f"tcp://{HOST}:{upstream}"

    class State(reqtable.StateRequestHandler):
        upstream: Any = None
        both: Any = None  # the want, which is made once
        ended: bool = False

        def start(self) -> Any:
            return self.connected, connect(address)

        @state()
        def connected(self, upstream: Any) -> Any:
            self.upstream = upstream
            self.both = either(chunk(read_bytes), upstream.chunk(read_bytes))
            return self.moved, self.both

        @state()
        def moved(self, arrived: Any) -> Any:
            index, item = arrived
            if item:
                if index:
                    self.send(item)
                else:
                    self.upstream.send(item)
                return self.moved, self.both
            return self.side_ended(index)

        def side_ended(self, index: int) -> Any:
            if index == 0:
                self.upstream.end_output()
            if self.ended:
                return None
            self.ended = True
            if index == 0:
                return self.moved, self.both
            return self.output_ended, reqtable.end_output()

        @state()
        def output_ended(self, nothing: None) -> Any:
            return self.moved, self.both

    class Async(reqtable.AsyncRequestHandler):
        async def handle(self) -> None:
            upstream = await self.read(connect(address))
            both = either(chunk(read_bytes), upstream.chunk(read_bytes))
            ended = 0
            while ended < 2:
                index, item = await self.read(both)
                if item:
                    await (self if index else upstream).send(item)
                    continue
                ended += 1
                if index:
                    await self.read(reqtable.end_output())
                else:
                    upstream.end_output()

    return {"state": State, "async": Async}[style]


def reqtable_publish(style: str) -> Any:
    """Make a publisher's server. Its subscribers may send more lines, and an end of file ends them."""
    import reqtable
    from reqtable import either, line, state, told

    subscribers: dict[Any, None] = {}

    def publish(text: bytes) -> None:
        for each in subscribers:
            each.tell(text)

    class State(reqtable.StateRequestHandler):
        @state(line())
        def command(self, text: bytes) -> Any:
            if not text.startswith(b"s"):
                publish(text)
                return self.command
            subscribers[self] = None
            self.send(text)
            return self.arrived

        @state(either(line(), told()))
        def arrived(self, arrived: Any) -> Any:
            index, text = arrived
            if index:
                self.send(text)
            elif not text:
                return None
            return self.arrived

        def on_close(self) -> None:
            subscribers.pop(self, None)

    class Told(State):
        """Waits for messages alone."""

        @state(told())
        def arrived(self, text: bytes) -> Any:
            self.send(text)
            return self.arrived

    class Async(reqtable.AsyncRequestHandler):
        async def handle(self) -> None:
            while text := await self.read(line()):
                if text.startswith(b"s"):
                    return await self.subscribe(text)
                publish(text)

        async def subscribe(self, text: bytes) -> None:
            subscribers[self] = None
            both = either(line(), told())
            try:
                while text:
                    await self.send(text)
                    _, text = await self.read(both)
            finally:
                del subscribers[self]

    return {"state": State, "told": Told, "async": Async}[style]


def reqtable_publish_by_send(style: str) -> Any:
    """Make a server whose publisher itself sends to the subscribers."""
    import reqtable
    from reqtable import line, state

    subscribers: dict[Any, None] = {}

    class Sends(reqtable.StateRequestHandler):
        @state(line())
        def command(self, text: bytes) -> Any:
            if text.startswith(b"s"):
                subscribers[self] = None
                self.send(text)
            else:
                for each in subscribers:
                    each.send(text)
            return self.command

        def on_close(self) -> None:
            subscribers.pop(self, None)

    return Sends


# -- asyncio's streams, on its own loop and on uvloop -----------------------------------------------------------------


def serve_streams(run: Callable[..., Any], serve: Callable[..., Any]) -> None:
    import asyncio

    async def main() -> None:
        server = await asyncio.start_server(serve, *ANYWHERE, limit=read_bytes, backlog=QUEUE)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    run(main())


def streams_forward(run: Callable[..., Any]) -> None:
    import asyncio

    async def move(reader: Any, writer: Any) -> None:
        while data := await reader.read(read_bytes):
            writer.write(data)
            await writer.drain()
        writer.write_eof()

    async def forward(reader: Any, writer: Any) -> None:
        far_reader, far_writer = await asyncio.open_connection(HOST, upstream, limit=read_bytes)
        there = asyncio.create_task(move(reader, far_writer))
        try:
            await move(far_reader, writer)
            await there
        except ConnectionError:
            there.cancel()
        finally:
            writer.close()
            far_writer.close()

    serve_streams(run, forward)


def streams_publish(run: Callable[..., Any]) -> None:
    """Serve each subscriber by a bounded queue and a task, as a slow subscriber must not hold up the others."""
    import asyncio

    queues: set[Any] = set()

    async def deliver(queue: Any, writer: Any) -> None:
        while True:
            writer.write(await queue.get())
            await writer.drain()

    async def subscribe(text: bytes, reader: Any, writer: Any) -> None:
        queue: Any = asyncio.Queue(WAITING_MAX)
        queues.add(queue)
        writer.write(text)
        delivering = asyncio.create_task(deliver(queue, writer))
        try:
            while await reader.readline():
                pass
        finally:
            queues.discard(queue)
            delivering.cancel()

    async def serve(reader: Any, writer: Any) -> None:
        try:
            while text := await reader.readline():
                if text.startswith(b"s"):
                    await subscribe(text, reader, writer)
                    break
                for queue in queues:
                    if not queue.full():
                        queue.put_nowait(text)
        except ConnectionError:
            pass
        finally:
            writer.close()

    serve_streams(run, serve)


def streams_publish_by_write(run: Callable[..., Any]) -> None:
    """Let the publisher itself write to the subscribers: nothing bounds what a slow subscriber makes this hold."""
    writers: set[Any] = set()

    async def serve(reader: Any, writer: Any) -> None:
        try:
            while text := await reader.readline():
                if text.startswith(b"s"):
                    writers.add(writer)
                    writer.write(text)
                else:
                    for each in writers:
                        each.write(text)
        except ConnectionError:
            pass
        finally:
            writers.discard(writer)
            writer.close()

    serve_streams(run, serve)


# -- HAProxy ----------------------------------------------------------------------------------------------------------


def haproxy_forward() -> None:
    """Become HAProxy, with one thread, as the other servers have."""
    bound = socket.create_server(ANYWHERE, backlog=QUEUE)
    bound.set_inheritable(True)
    configuration = os.memfd_create("haproxy.cfg", 0)
    os.write(
        configuration,
        (
            "global\n  nbthread 1\n  maxconn 2000\n"
            "defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 1m\n  timeout server 1m\n"
            f"listen forward\n  bind fd@{bound.fileno()}\n  server upstream {HOST}:{upstream}\n"
        ).encode(),
    )
    print(bound.getsockname()[1], flush=True)
    os.execvp("haproxy", ["haproxy", "-db", "-q", "-f", f"/proc/self/fd/{configuration}"])
