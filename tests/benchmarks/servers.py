"""The servers that are measured. All do the same work, each in the best form of its library, in a few lines.

A `Peer` serves some kinds of work. `lines` echoes each line, and `answers` (the same servers) answers it with 1 MB.
`datagrams` echoes each datagram. `redis` is `examples/miniredis.py`, or its commands in a protocol or on streams.
`forward`, `forward-256` (the same servers, which read more at once) and `publish` are in `relays`. `hello`,
`hello-large`, `file`, `websocket` and `events` are in `http_servers`. `same` and `changing` are in `takeover`.
`shutdown` and `snapshot` are timed by the server itself. If a library delivers raw chunks, the peer splits them into
lines in Python, answers each line and keeps a partial line. A peer whose name ends with `-pure` does without the C
module.

    python -m tests.benchmarks.servers PEER KIND [UPSTREAM_PORT]

serves until it is killed. The first line that it prints is its port. Each peer imports its own library and no other.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import random
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tests.benchmarks import http_servers, relays, takeover

ANYWHERE = ("127.0.0.1", 0)
QUEUE = 1024  # the kernel's queue of connections, the same for all
ANSWER_BYTES = 2**20
DATAGRAM_BYTES = 8192
LIMIT = 65_536  # of a line
ENTRIES_MAX = 100_000
THREADS = 1100  # enough for every work, with a thread for each connection
CHILDREN = 40  # the default of `max_children` in reqtable and in socketserver

VARIANTS = {"answers": "lines", "forward-256": "forward"}  # the same servers, differently set

answer = b""  # the answer to each line; empty: the line itself


@dataclass(frozen=True)
class Peer:
    """Describes a server.

    `kinds` maps each kind of work to the function that serves it. `connections_max` is how many connections the server
    can have open at once. If `is_program`, it is no package but a program. `beside` are packages that it needs as well.
    `environment` is set before the library is imported.
    """

    name: str
    package: str
    kinds: dict[str, Callable[[], None]]
    connections_max: int = ENTRIES_MAX
    is_program: bool = False
    beside: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def serves(self, kind: str) -> bool:
        return VARIANTS.get(kind, kind) in self.kinds

    @property
    def missing(self) -> str | None:
        """Why the peer can't be measured here; None if it can."""
        if self.is_program:
            return None if shutil.which(self.package) else f"there is no {self.package} here"
        for package in (self.package, *self.beside):
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed"
        return None


def listening(kind: int = socket.SOCK_STREAM) -> socket.socket:
    """Return a bound socket, after printing its port."""
    bound = socket.socket(socket.AF_INET, kind)
    bound.bind(ANYWHERE)
    if kind == socket.SOCK_STREAM:
        bound.listen(QUEUE)
    say_port(bound.getsockname())
    return bound


def say_port(address: Any) -> None:
    print(address[1], flush=True)


# -- reqtable ---------------------------------------------------------------------------------------------------------


def reqtable_lines(style: str) -> Any:
    import reqtable
    from reqtable import line, state

    class State(reqtable.StateRequestHandler):
        @state(line())
        def echo(self, text: bytes) -> Any:
            self.send(answer or text)
            return self.echo

    class Async(reqtable.AsyncRequestHandler):
        async def handle(self) -> None:
            while text := await self.read(line()):
                await self.send(answer or text)

    class Blocking(reqtable.StreamRequestHandler):
        disable_nagle_algorithm = True

        def handle(self) -> None:
            for text in self.rfile:
                self.wfile.write(answer or text)

    return {"state": State, "async": Async, "blocking": Blocking}[style]


def reqtable_datagrams(style: str) -> Any:
    import reqtable
    from reqtable import datagram, state

    class State(reqtable.StateRequestHandler):
        @state(datagram())
        def echo(self, data: bytes) -> Any:
            self.send(data)
            return self.echo

    class Async(reqtable.AsyncRequestHandler):
        async def handle(self) -> None:
            while data := await self.read(datagram()):
                await self.send(data)

    class Blocking(reqtable.DatagramRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.read())

    return {"state": State, "async": Async, "blocking": Blocking}[style]


def reqtable_redis(style: str) -> Any:
    from examples.miniredis import MiniRedis

    return MiniRedis


def reqtable_snapshot(style: str) -> Any:
    """Make a handler that echoes lines, and takes a snapshot if asked: in the step, or by a call in another thread."""
    import time

    import reqtable
    from reqtable import call, line, state

    class Looked(reqtable.StateRequestHandler):
        @state(line())
        def echo(self, text: bytes) -> Any:
            if text == b"thread\n":
                return self.answered, call(self.look, on="thread")
            return self.answered(self.look() if text == b"step\n" else text)

        @state()
        def answered(self, text: bytes) -> Any:
            self.send(text)
            return self.echo

        def look(self) -> bytes:
            began = time.perf_counter()
            rows = self.server.table.snapshot()
            return b"%d %f\n" % (len(rows), (time.perf_counter() - began) * 1e3)

    return Looked


def reqtable_serve(
    handler: Callable[[str], Any], style: str, scheme: str = "tcp", dispatch: str | None = None, **thread: Any
) -> None:
    import reqtable

    limits = reqtable.Limits(recv_bytes=relays.read_bytes)  # the default, unless a kind of work reads more at once
    reqtable.serve(
        handler(style),
        f"{scheme}://127.0.0.1:0",
        dispatch=dispatch,
        config=reqtable.Config(limits=limits, thread=reqtable.ThreadOptions(**thread)),
        on_listening=lambda names: print(names[0].rpartition(":")[2], flush=True),
    )


def shut_down(module: str, name: str) -> None:
    """For each line of the standard input, serve, call `shutdown()` in another thread, and print its milliseconds."""
    import threading
    import time

    library = importlib.import_module(module)
    with getattr(library, name)(ANYWHERE, library.StreamRequestHandler) as server:
        say_port(server.server_address)
        for _ in sys.stdin:
            asked: list[float] = []

            def ask(asked: list[float] = asked) -> None:
                time.sleep(random.uniform(0.2, 0.7))  # at a random point of a poll
                asked.append(time.perf_counter())
                server.shutdown()

            thread = threading.Thread(target=ask)
            thread.start()
            server.serve_forever()
            print((time.perf_counter() - asked[0]) * 1e3, flush=True)
            thread.join()


# -- the standard library ---------------------------------------------------------------------------------------------


def socketserver_serve(mixin: str, kind: str) -> None:
    import socketserver

    class Lines(socketserver.StreamRequestHandler):
        disable_nagle_algorithm = True

        def handle(self) -> None:
            for text in self.rfile:
                self.wfile.write(answer or text)

    class Datagrams(socketserver.DatagramRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.read())

    base = getattr(socketserver, f"{mixin}{'TCP' if kind == 'lines' else 'UDP'}Server")
    made = type("Server", (base,), {"request_queue_size": QUEUE, "daemon_threads": True})
    with made(ANYWHERE, Lines if kind == "lines" else Datagrams) as server:
        say_port(server.server_address)
        server.serve_forever()


# -- asyncio's protocols and streams, on its own loop and on uvloop ---------------------------------------------------


def on_uvloop(serve: Callable[[Callable[..., Any]], None]) -> None:
    import uvloop

    serve(uvloop.run)


def on_asyncio(serve: Callable[[Callable[..., Any]], None]) -> None:
    import asyncio

    serve(asyncio.run)


def protocol_lines(run: Callable[..., Any]) -> None:
    import asyncio

    class Lines(asyncio.Protocol):
        rest = b""

        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            *lines, self.rest = (self.rest + data).split(b"\n")
            self.transport.write(b"".join([answer or line + b"\n" for line in lines]))

    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(Lines, *ANYWHERE, backlog=QUEUE)
        say_port(server.sockets[0].getsockname())
        await server.serve_forever()

    run(main())


def protocol_datagrams(run: Callable[..., Any]) -> None:
    import asyncio

    class Datagrams(asyncio.DatagramProtocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def datagram_received(self, data: bytes, peer: Any) -> None:
            self.transport.sendto(data, peer)

    async def main() -> None:
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(Datagrams, local_addr=ANYWHERE)
        say_port(transport.get_extra_info("sockname"))
        await asyncio.get_running_loop().create_future()

    run(main())


def streams_lines(run: Callable[..., Any]) -> None:
    import asyncio

    async def echo(reader: Any, writer: Any) -> None:
        while text := await reader.readline():
            writer.write(answer or text)
            await writer.drain()
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(echo, *ANYWHERE, limit=LIMIT, backlog=QUEUE)
        say_port(server.sockets[0].getsockname())
        await server.serve_forever()

    run(main())


def redis_commands() -> Any:
    """Make a class that runs the commands of examples/miniredis.py, and sends the answers by a function."""
    from examples.miniredis import MiniRedis

    class Commands(MiniRedis):
        def __init__(self, send: Callable[[bytes], None]) -> None:
            self.send = send  # type: ignore[method-assign]

    return Commands


def protocol_redis(run: Callable[..., Any]) -> None:
    """Serve with the parser of examples/miniredis.py, as each protocol does that is given raw chunks."""
    import asyncio

    from examples.miniredis import whole_command

    made = redis_commands()

    class Redis(asyncio.Protocol):
        rest = b""

        def connection_made(self, transport: Any) -> None:
            self.transport = transport
            self.commands = made(transport.write)

        def data_received(self, data: bytes) -> None:
            data = self.rest + data if self.rest else data
            while data and type(found := whole_command(data)) is tuple:
                self.commands.arguments, size = found
                data = data[size:]
                if self.commands.arguments and not self.commands.execute():
                    self.transport.close()
                    return
            self.rest = data

    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(Redis, *ANYWHERE, backlog=QUEUE)
        say_port(server.sockets[0].getsockname())
        await server.serve_forever()

    run(main())


def streams_redis(run: Callable[..., Any]) -> None:
    import asyncio

    made = redis_commands()

    async def serve(reader: Any, writer: Any) -> None:
        commands = made(writer.write)
        while text := await reader.readline():
            if text[:1] == b"*":
                commands.arguments = []
                for _ in range(int(text[1:])):
                    size = int((await reader.readline())[1:])
                    commands.arguments.append((await reader.readexactly(size + 2))[:-2])
            else:
                commands.arguments = text.split()
            if commands.arguments and not commands.execute():
                break
            await writer.drain()
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(serve, *ANYWHERE, limit=LIMIT, backlog=QUEUE)
        say_port(server.sockets[0].getsockname())
        await server.serve_forever()

    run(main())


# -- other libraries --------------------------------------------------------------------------------------------------


def gevent_lines() -> None:
    from gevent.server import StreamServer

    def echo(connection: Any, peer: Any) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection.makefile("rb") as lines:
            for text in lines:
                connection.sendall(answer or text)

    server = StreamServer(ANYWHERE, echo, backlog=QUEUE)
    server.start()
    say_port(server.address)
    server.serve_forever()


def gevent_datagrams() -> None:
    from gevent.server import DatagramServer

    server = DatagramServer(ANYWHERE, lambda data, peer: server.sendto(data, peer))
    server.start()
    say_port(server.address)
    server.serve_forever()


def trio_lines() -> None:
    import trio

    async def echo(stream: Any) -> None:
        rest = b""
        async for data in stream:
            *lines, rest = (rest + data).split(b"\n")
            await stream.send_all(b"".join([answer or line + b"\n" for line in lines]))

    async def main() -> None:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=QUEUE)
        say_port(listener.socket.getsockname())
        await trio.serve_listeners(echo, [listener])

    trio.run(main)


def trio_datagrams() -> None:
    import trio

    async def main() -> None:
        bound = trio.socket.from_stdlib_socket(listening(socket.SOCK_DGRAM))
        while True:
            data, peer = await bound.recvfrom(DATAGRAM_BYTES)
            await bound.sendto(data, peer)

    trio.run(main)


def twisted_lines() -> None:
    from twisted.internet import protocol, reactor
    from twisted.protocols.basic import LineOnlyReceiver

    class Lines(LineOnlyReceiver):
        delimiter = b"\n"
        MAX_LENGTH = LIMIT

        def connectionMade(self) -> None:  # noqa: N802
            self.transport.setTcpNoDelay(True)

        def lineReceived(self, text: bytes) -> None:  # noqa: N802
            self.transport.write(answer or text + b"\n")

    place = reactor.listenTCP(0, protocol.Factory.forProtocol(Lines), backlog=QUEUE, interface="127.0.0.1")
    print(place.getHost().port, flush=True)
    reactor.run()


def twisted_datagrams() -> None:
    from twisted.internet import protocol, reactor

    class Datagrams(protocol.DatagramProtocol):
        def datagramReceived(self, data: bytes, peer: Any) -> None:  # noqa: N802
            self.transport.write(data, peer)

    print(reactor.listenUDP(0, Datagrams(), interface="127.0.0.1").getHost().port, flush=True)
    reactor.run()


def tornado_lines() -> None:
    import asyncio

    from tornado.iostream import StreamClosedError
    from tornado.tcpserver import TCPServer

    class Lines(TCPServer):
        async def handle_stream(self, stream: Any, peer: Any) -> None:
            stream.set_nodelay(True)
            try:
                while True:
                    text = await stream.read_until(b"\n")
                    await stream.write(answer or text)
            except StreamClosedError:
                pass

    async def main() -> None:
        bound = listening()
        bound.setblocking(False)
        Lines().add_socket(bound)
        await asyncio.get_running_loop().create_future()

    asyncio.run(main())


def curio_lines() -> None:
    import curio
    from curio import network

    async def echo(client: Any, peer: Any) -> None:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        async with client.as_stream() as stream:
            async for text in stream:
                await stream.write(answer or text)

    async def main() -> None:
        bound = network.tcp_server_socket(*ANYWHERE, backlog=QUEUE)
        say_port(bound.getsockname())
        await network.run_server(bound, echo)

    curio.run(main)


def curio_datagrams() -> None:
    import curio
    from curio.io import Socket

    async def main() -> None:
        bound = Socket(listening(socket.SOCK_DGRAM))
        while True:
            data, peer = await bound.recvfrom(DATAGRAM_BYTES)
            await bound.sendto(data, peer)

    curio.run(main)


# -- the peers --------------------------------------------------------------------------------------------------------


def reqtable_peer(name: str, style: str, dispatch: str | None = None, most: int = ENTRIES_MAX, **more: Any) -> Peer:
    kinds = {
        "lines": partial(reqtable_serve, reqtable_lines, style, "tcp", dispatch),
        "datagrams": partial(reqtable_serve, reqtable_datagrams, style, "udp", dispatch),
    }
    return Peer(f"reqtable-{name}", "reqtable", kinds | more, most)


def pure_peer(name: str, style: str, dispatch: str | None = None, **more: Any) -> Peer:
    lines = partial(reqtable_serve, reqtable_lines, style, "tcp", dispatch)
    return Peer(f"reqtable-{name}-pure", "reqtable", {"lines": lines} | more, environment={"REQTABLE_PURE": "1"})


def socketserver_peer(name: str, mixin: str, most: int) -> Peer:
    kinds = {kind: partial(socketserver_serve, mixin, kind) for kind in ("lines", "datagrams")}
    kinds["shutdown"] = partial(shut_down, "socketserver", f"{mixin}TCPServer")
    return Peer(f"socketserver{name}", "socketserver", kinds, most)


def asyncio_peers(loop: str, on: Callable[..., None]) -> Iterator[Peer]:
    protocol = {"lines": protocol_lines, "datagrams": protocol_datagrams, "redis": protocol_redis}
    streams = {
        "lines": streams_lines,
        "redis": streams_redis,
        "forward": relays.streams_forward,
        "publish": relays.streams_publish,
    }
    direct = {"publish": relays.streams_publish_by_write}
    for style, serves in (("protocol", protocol), ("streams", streams), ("writes", direct)):
        yield Peer(f"{loop}-{style}", loop, {kind: partial(on, serve) for kind, serve in serves.items()})


OURS = (
    reqtable_peer(
        "state",
        "state",
        redis=partial(reqtable_serve, reqtable_redis, "state"),
        snapshot=partial(reqtable_serve, reqtable_snapshot, "state"),
        forward=partial(reqtable_serve, relays.reqtable_forward, "state"),
        publish=partial(reqtable_serve, relays.reqtable_publish, "state"),
        shutdown=partial(shut_down, "reqtable", "TCPServer"),
    ),
    reqtable_peer(
        "async",
        "async",
        forward=partial(reqtable_serve, relays.reqtable_forward, "async"),
        publish=partial(reqtable_serve, relays.reqtable_publish, "async"),
    ),
    Peer("reqtable-told", "reqtable", {"publish": partial(reqtable_serve, relays.reqtable_publish, "told")}),
    Peer("reqtable-sends", "reqtable", {"publish": partial(reqtable_serve, relays.reqtable_publish_by_send, "state")}),
    reqtable_peer("pool", "state", "pool"),
    reqtable_peer("greenlet", "blocking", "greenlet", shutdown=partial(shut_down, "reqtable", "TableTCPServer")),
    reqtable_peer("inline", "blocking", "inline", 1),
    reqtable_peer(
        "thread", "blocking", "thread", THREADS, shutdown=partial(shut_down, "reqtable", "ThreadingTCPServer")
    ),
    Peer(
        "reqtable-thread-reuse",
        "reqtable",
        {"lines": partial(reqtable_serve, reqtable_lines, "blocking", "tcp", "thread", reuse=True)},
        THREADS,
    ),
    reqtable_peer("fork", "blocking", "fork", CHILDREN),
    pure_peer("state", "state", redis=partial(reqtable_serve, reqtable_redis, "state")),
    pure_peer("async", "async"),
    pure_peer("greenlet", "blocking", "greenlet"),
    *(Peer(name, "reqtable", kinds) for name, kinds in takeover.PEERS.items()),
    *(Peer(f"reqtable-{name}", "reqtable", kinds) for name, kinds in http_servers.OURS.items()),
)

PEERS = {
    peer.name: peer
    for peer in (
        *OURS,
        socketserver_peer("", "", 1),
        socketserver_peer("-threading", "Threading", THREADS),
        socketserver_peer("-forking", "Forking", CHILDREN),
        *asyncio_peers("asyncio", on_asyncio),
        *asyncio_peers("uvloop", on_uvloop),
        Peer("gevent", "gevent", {"lines": gevent_lines, "datagrams": gevent_datagrams}),
        Peer("trio", "trio", {"lines": trio_lines, "datagrams": trio_datagrams}),
        Peer("twisted", "twisted", {"lines": twisted_lines, "datagrams": twisted_datagrams}),
        Peer("tornado", "tornado", {"lines": tornado_lines}),
        Peer("curio", "curio", {"lines": curio_lines, "datagrams": curio_datagrams}),
        *(
            Peer(name, package, kinds, beside=http_servers.BESIDE.get(name, ()))
            for name, (package, kinds) in http_servers.OTHERS.items()
        ),
        Peer("haproxy", "haproxy", {"forward": relays.haproxy_forward}, is_program=True),
    )
}


def main() -> None:
    global answer
    name, kind, *upstream = sys.argv[1:]
    relays.upstream = int(*upstream)
    peer = PEERS[name]
    os.environ |= peer.environment
    if kind == "answers":
        answer = b"x" * (ANSWER_BYTES - 1) + b"\n"
    elif kind == "forward-256":
        relays.read_bytes = relays.LARGE_BYTES
    peer.kinds[VARIANTS.get(kind, kind)]()


if __name__ == "__main__":
    main()
