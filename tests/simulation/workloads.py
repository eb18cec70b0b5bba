"""The workloads of the fuzzer. Each seed gives a server, its clients, its faults, and what each client must see.

A workload depends on its seed alone. What a client must see is in its script, as expectations. If it depends on the
other clients, the workload's `check` looks at it afterwards.
"""

from __future__ import annotations

import functools
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.util import Finalize
from pathlib import Path
from random import Random
from typing import Any

import reqtable
from examples.chat import Chat
from examples.echo import AsyncEcho, BlockingEcho, StateEcho
from examples.miniredis import MiniRedis, Store
from examples.notes import Notes, slow_rank
from examples.tftp import ACK, BLOCK_BYTES, DATA, ERROR, READ, Tftp
from reqtable.dispatch import is_resumable
from reqtable.loop.platform import SYSTEM
from reqtable.testing import Client, Faults, Peer, Report, SimulationFailed, simulate
from tests.simulation import failing, leaving, upstreams
from tests.simulation.handlers import (
    AsyncBlobs,
    AsyncChat,
    AsyncNotes,
    AsyncRedis,
    AsyncTftp,
    Blobs,
    BlockingNotes,
    blob,
)
from tests.simulation.shared import (
    HARSH,
    Dialogue,
    Watched,
    Workload,
    choose_config,
    choose_faults,
    finish,
    make_server,
    nothing_more,
    play_dialogue,
    send_in_pieces,
    unclosed,
)


def run(seed: int, only: Sequence[str] | None = None) -> tuple[str, Report]:
    """Simulate the workload of a seed; `only` names the faults that may happen. Raises SimulationFailed."""
    workload = workload_of(seed)
    faults = workload.faults if only is None else workload.faults.restricted_to(only)
    unclosed.clear()
    report = simulate(
        workload.server,
        workload.clients,
        upstreams=workload.upstreams,
        names=workload.names,
        seed=seed,
        faults=faults,
    )
    report.problems += workload.check(report)
    report.problems += [f"on_close was never called for the handler of {handler.entry!r}" for handler in unclosed]
    if report.problems:
        raise SimulationFailed(report)
    return workload.name, report


def workload_of(seed: int) -> Workload:
    rng = Random(seed)
    protocol = PROTOCOLS[seed % len(PROTOCOLS)]
    return protocol(rng)


# -- the protocols ---------------------------------------------------------------------------------------------------


def echo(rng: Random) -> Workload:
    handler = rng.choice([StateEcho, AsyncEcho, BlockingEcho])
    # A socket's timeout begins anew with each read, so a trickle of bytes keeps a blocking handler's connection open.
    dribbling_s = 60 if is_resumable(handler) else None
    clients = []
    for _ in range(rng.randrange(1, 8)):
        lines = [
            rng.randbytes(rng.choice([0, 3, 60, 900])).replace(b"\n", b"") + b"\n" for _ in range(rng.randrange(12))
        ]
        client = play_dialogue(rng, [(text, text) for text in lines], 50)
        if rng.random() < 0.3:
            # the last line may lack its line end
            clients.append(client.send(b"the last").end().expect(b"the last").expect_end())
        else:
            client.send(b"\n").expect(b"\n")
            clients.append(finish(rng, client, b"and?\n", b"", 60, dribbling_s))
    server = make_server(rng, lambda: handler)
    return Workload(f"echo {handler.__name__}", server, clients, choose_faults(rng, **HARSH), nothing_more)


def notes(rng: Random) -> Workload:
    handler = rng.choice([Notes, AsyncNotes, BlockingNotes])
    dribbling_s = 30 if is_resumable(handler) else None
    clients = []
    for _ in range(rng.randrange(1, 8)):
        words, dialogue = 0, []
        for _ in range(rng.randrange(15)):
            verb = rng.choice(["put", "put", "count", "rank"])
            if verb == "put":
                note = rng.randbytes(rng.choice([0, 5, 80, 1000]))
                words += len(note.split())
                dialogue.append((b"put %d\n" % len(note) + note, b""))
            elif verb == "count":
                dialogue.append((b"count\n", b"%d\n" % words))
            else:
                dialogue.append((b"rank\n", b"rank %d\n" % slow_rank(words)))
        client = play_dialogue(rng, dialogue, 20).send(b"count\n").expect(b"%d\n" % words)
        clients.append(finish(rng, client, b"count\n", b"bye\n", 30, dribbling_s))
    server = make_server(rng, lambda: handler)
    return Workload(f"notes {handler.__name__}", server, clients, choose_faults(rng, **HARSH), nothing_more)


def _resp(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


def miniredis(rng: Random) -> Workload:
    style = rng.choice([MiniRedis, AsyncRedis])
    counted: list[int] = []

    def increment(peer: Peer) -> Any:
        """Increment the shared key. The answer depends on the other clients, so `check` looks at it afterwards."""
        answer = b""
        yield from peer.send(_resp(b"INCR", b"shared"))
        while not answer.endswith(b"\n"):
            part = yield from peer.receive()
            if part is None:
                return
            answer += part
        counted.append(int(answer[1:]))

    clients = [_redis_client(rng, b"%d" % number, increment) for number in range(rng.randrange(1, 8))]

    def check(report: Report) -> Iterator[str]:
        if len(set(counted)) != len(counted):
            yield f"INCR gave the same number twice: {counted}"
        if not any(peer.was_hit for peer in report.clients) and sorted(counted) != list(range(1, len(clients) + 1)):
            yield f"{len(clients)} clients counted {sorted(counted)}"

    server = make_server(rng, lambda: _with_store(style), pool=0.4 * (style is MiniRedis))
    return Workload(f"miniredis {style.__name__}", server, clients, choose_faults(rng, **HARSH), check)


def killing(rng: Random) -> Workload:
    """Make clients of miniredis that kill each other and themselves in mid-dialogue."""
    style = rng.choice([MiniRedis, AsyncRedis])
    count = rng.randrange(2, 8)
    expected: list[bytes] = []

    def talk(dialogue: Dialogue, victim: int) -> Callable[[Peer], Any]:
        def play(peer: Peer) -> Any:
            for sent, _ in dialogue:
                yield from peer.send(sent)
            yield lambda: False, 1.0
            yield from peer.send(_resp(b"CLIENT", b"KILL", b"ID", b"%d" % victim))

        return play

    clients = []
    for number in range(count):
        dialogue = _redis_dialogue(rng, b"%d" % number)
        expected.append(b"".join(answer for _, answer in dialogue))
        script = talk(dialogue, rng.randrange(1, count + 1))
        clients.append(Client().pause(rng.choice([0, 0, 1])).may_fail().then(script).end().take_rest())

    def check(report: Report) -> Iterator[str]:
        for peer, whole in zip(report.clients, expected, strict=True):
            answers = [whole + last for last in (b":0\r\n", b":1\r\n", b"+OK\r\n")]
            if not any(answer.startswith(peer.received) for answer in answers):
                yield f"{peer} received {peer.received!r} instead of {whole!r}"

    server = make_server(rng, lambda: _with_store(style), pool=0.8 * (style is MiniRedis))
    return Workload(f"killing {style.__name__}", server, clients, choose_faults(rng, **HARSH), check)


def _with_store(style: Any) -> Any:
    return type(style.__name__, (style,), {"store": Store(SYSTEM.get().clock)})


def _redis_client(rng: Random, own: bytes, increment: Callable[[Peer], Any]) -> Client:
    """Make a client that uses its own keys, and one key that all clients share."""
    client = play_dialogue(rng, _redis_dialogue(rng, own), 200)
    if rng.random() < 0.3:
        client.send(_resp(b"SET", own, b"1", b"EX", b"10")).expect(b"+OK\r\n").pause(12)
        client.send(_resp(b"GET", own)).expect(b"$-1\r\n")
    client.then(increment)
    if rng.random() < 0.2:
        refusal = b"-ERR Protocol error: invalid multibulk length\r\n"
        return client.send(b"*many\r\n" + bytes(rng.randrange(60))).expect(refusal).expect_end()
    return finish(rng, client, _resp(b"PING"), _resp(b"QUIT"))


def _redis_dialogue(rng: Random, own: bytes) -> Dialogue:
    """Make commands about a client's own keys, and their answers."""
    values: dict[bytes, bytes] = {}
    dialogue: Dialogue = []
    for _ in range(rng.randrange(15)):
        key = own + rng.choice([b"a", b"b"])
        verb = rng.choice(["set", "get", "del", "ping", "echo", "mset", "wrong", "inline"])
        value = rng.randbytes(rng.choice([0, 10, 700]))
        if verb == "set":
            values[key] = value
            dialogue.append((_resp(b"SET", key, value), b"+OK\r\n"))
        elif verb == "get":
            known = values.get(key)
            answer = b"$-1\r\n" if known is None else b"$%d\r\n%b\r\n" % (len(known), known)
            dialogue.append((_resp(b"GET", key), answer))
        elif verb == "del":
            dialogue.append((_resp(b"DEL", key), b":%d\r\n" % (values.pop(key, None) is not None)))
        elif verb == "mset":
            values[own + b"a"] = values[own + b"b"] = value
            dialogue.append((_resp(b"MSET", own + b"a", value, own + b"b", value), b"+OK\r\n"))
        elif verb == "ping":
            dialogue.append((_resp(b"PING"), b"+PONG\r\n"))
        elif verb == "echo":
            dialogue.append((_resp(b"ECHO", value), b"$%d\r\n%b\r\n" % (len(value), value)))
        elif verb == "wrong":
            dialogue.append((_resp(b"NOSUCH"), b"-ERR unknown command 'NOSUCH'\r\n"))
        else:
            dialogue.append((b"PING\r\n", b"+PONG\r\n"))
    return dialogue


@functools.cache
def folder() -> Path:
    """Make a folder that is removed when the process that made it exits.

    Only `Finalize` works with forked processes. It removes nothing in a child of the process that made the folder. It
    does run in a worker of `multiprocessing`, where `atexit` is cleared (Python 3.13) or not called (before).
    """
    made = Path(tempfile.mkdtemp(prefix="reqtable-simulation-"))
    Finalize(None, shutil.rmtree, [made], exitpriority=0)
    return made


@functools.cache
def tftp_files() -> dict[str, bytes]:
    """Write the files that are served, and return them by name."""
    files = {f"file{size}": Random(size).randbytes(size) for size in (0, 1, 511, 512, 513, 1024, 4000)}
    for name, data in files.items():
        (folder() / name).write_bytes(data)
    return files


def tftp(rng: Random) -> Workload:
    files = tftp_files()
    handler = rng.choice([Tftp, AsyncTftp])
    wanted: list[str] = []
    results: dict[int, bytes | int | None] = {}

    def fetch(name: str) -> Callable[[Peer], Any]:
        def play(peer: Peer) -> Any:
            results[peer.number] = yield from _fetch(peer, name)

        return play

    clients = []
    for _ in range(rng.randrange(1, 6)):
        wanted.append(rng.choice([*files, "nosuch"]))
        clients.append(Client().pause(rng.uniform(0, 3)).then(fetch(wanted[-1])))

    def check(report: Report) -> Iterator[str]:
        for number, name in enumerate(wanted):
            result = results.get(number)
            hits = [fault for fault in report.faults if f"@d{number}" in fault]
            stalled = any(fault.startswith("stalled") for fault in report.faults)
            if (
                result != files.get(name, 1)
                and not any(each.startswith(("lost", "cut")) for each in hits)
                and not stalled
            ):
                yield f"client {number} fetched {name} and got {str(result)[:80]}"
            # faults may lose what the server sends, but it is never wrong
            elif (
                isinstance(result, bytes)
                and result != files.get(name)
                and not any(f"cut@d{number}<" in f for f in hits)
            ):
                yield f"client {number} fetched {name} and got {len(result)} other bytes"

    harsh = {"lost": 0.1, "repeated": 0.1, "reordered": 0.1, "cut": rng.choice([0, 0.03])}

    def make() -> Any:
        return type(handler.__name__, (handler,), {"root": folder()})

    server = make_server(rng, make, reqtable.UDPServer)
    return Workload(f"tftp {handler.__name__}", server, clients, choose_faults(rng, **harsh), check)


def _fetch(peer: Peer, name: str) -> Any:
    """Fetch a file as a TFTP client does (RFC 1350). Returns its bytes, an error code, or None after too many tries."""
    packet = struct.pack("!H", READ) + name.encode() + b"\0octet\0"
    data, block, tries = b"", 1, 0
    yield from peer.send(packet)
    while tries < 8:
        got = yield from peer.receive(timeout_s=1.5)
        if got is None:
            tries += 1
            yield from peer.send(packet)
        elif got[:2] == struct.pack("!H", ERROR):
            return int.from_bytes(got[2:4], "big")
        elif got[:4] == struct.pack("!HH", DATA, block):
            data += got[4:]
            packet = struct.pack("!HH", ACK, block)
            yield from peer.send(packet)
            if len(got) < 4 + BLOCK_BYTES:
                while (yield from peer.receive(timeout_s=3)) is not None:
                    yield from peer.send(packet)  # the last acknowledgement was lost
                return data
            block, tries = block + 1, 0
        elif len(got) >= 4 and got[:2] == struct.pack("!H", DATA):
            tries += 1  # a repeated block: its acknowledgement is on its way
    return None


def chat(rng: Random) -> Workload:
    handler = rng.choice([Chat, AsyncChat])
    clients, said = [], []
    for number in range(rng.randrange(2, 7)):
        lines = [f"line {count} of {number}" for count in range(rng.choice([0, 3, 30, 60]))]
        said.append(lines)
        client = Client().pause(rng.choice([0, 0, 0, 5])).expect(b"your name? ")
        if number and rng.random() < 0.2:
            client.send(b"\n").expect(b"that name is taken. your name? ")
        client.send(b"client%d\n" % number)
        if rng.random() < 0.3:
            client.read_nothing(20)  # output for this client piles up, while its own lines are delivered
        if rng.random() < 0.6:
            client.send("".join(f"{text}\n" for text in lines).encode())
        else:
            for text in lines:
                send_in_pieces(rng, client, text.encode() + b"\n")
                if rng.random() < 0.3:
                    client.pause(rng.uniform(0, 10))
        if rng.random() < 0.2:
            client.reset()
        else:
            client.pause(rng.uniform(0, 10))
            client = client.send(b"/quit\n") if rng.random() < 0.5 else client.end()
            client.take_rest()
        clients.append(client)

    def check(report: Report) -> Iterator[str]:
        return _check_chat(report, said)

    server = make_server(rng, lambda: handler, pool=0.4 * (handler is Chat))
    # with small buffers, clients talk in bursts to clients that can take little at a time
    faults = choose_faults(rng, **HARSH) if rng.random() < 0.5 else Faults(small_buffer=1.0, delayed=0.02)
    return Workload(f"chat {handler.__name__}", server, clients, faults, check)


def _check_chat(report: Report, said: list[list[str]]) -> Iterator[str]:
    heard: list[list[str]] = []
    for peer in report.clients:
        text = peer.received.decode().replace("your name? ", "").replace("that name is taken. ", "")
        heard.append(text.split("\n")[:-1])  # without the part after the last line end, which was cut off
    for listener, lines in zip(report.clients, heard, strict=True):
        for number, theirs in enumerate(said):
            talker = report.clients[number]
            name = f"client{number}"
            prefix = f"{name}: "
            got = [text.removeprefix(prefix) for text in lines if text.startswith(prefix)]
            if listener is talker:
                if got:
                    yield f"{listener} received its own lines"
                continue
            begin = theirs.index(got[0]) if got and got[0] in theirs else 0
            if got != theirs[begin : begin + len(got)]:
                yield f"{listener} heard {got} of {talker}, who said {theirs}"
            joined, left = f"* {name} has joined" in lines, f"* {name} has left" in lines
            whole = talker.ended == "end" and not talker.was_hit
            if joined and begin:
                yield f"{listener} was there when {talker} joined, and missed its first line"
            if joined and left and whole and got != theirs:
                yield f"{listener} heard {got} of {theirs} that {talker} said from beginning to end"
    # all clients hear the lines in the same order
    for number, one in enumerate(heard):
        for other in heard[number + 1 :]:
            common = set(one) & set(other)
            if [text for text in one if text in common] != [text for text in other if text in common]:
                yield f"client {number} and another client heard the same lines in different orders: {one} and {other}"


def _with_operator(rng: Random, make: Callable[[], Any], rate: float) -> Callable[[], Any]:
    """Make the same server with an operator that cancels a random request after a pass, with probability `rate`."""

    def server() -> Any:
        made = make()

        def cancel_one() -> None:
            ids = [entry.id for entry in made.table]
            if ids and rng.random() < rate:
                made.table.cancel(rng.choice(ids))

        made.service_actions = cancel_one
        return made

    return server


def departing(rng: Random) -> Workload:
    """Make clients that disconnect while their steps and calls run outside the loop."""
    handler, question = rng.choice([(Notes, b"rank\n"), (AsyncNotes, b"rank\n"), (MiniRedis, _resp(b"PING"))])
    clients = []
    for _ in range(rng.randrange(2, 10)):
        client = Client().may_fail().pause(rng.uniform(0, 1)).send(question * rng.choice([1, 3, 30]))
        if rng.random() < 0.5:
            client.read_nothing()
        client.pause(rng.choice([0, rng.uniform(0, 0.3), 1]))
        clients.append(client.reset() if rng.random() < 0.7 else client)

    def make() -> Any:
        return handler if handler is not MiniRedis else _with_store(MiniRedis)

    faults = Faults(small_buffer=0.7, reset=0.02)
    server = _with_operator(rng, make_server(rng, make, pool=0.7), rng.choice([0, 0.05]))
    return Workload(f"departing {handler.__name__}", server, clients, faults, nothing_more)


def cancelled(rng: Random) -> Workload:
    """Add an operator that cancels requests at any moment, whatever they are doing."""
    workload = rng.choice([echo, notes, notes, miniredis, chat, blobs])(rng)
    for client in workload.clients:
        client.steps.insert(0, ("may_fail", ()))
    server = _with_operator(rng, workload.server, rng.choice([0.02, 0.3]))
    return Workload(f"cancelled {workload.name}", server, workload.clients, workload.faults, nothing_more)


@functools.cache
def blob_file() -> str:
    """Write a file that holds `blob`, and return its path."""
    path = folder() / "blob"
    path.write_bytes(blob(400_000))
    return str(path)


def _never_reads(peer: Peer) -> Any:
    """Ask for much and read nothing: the server must close the connection after `write_timeout_s`."""
    yield from peer.send(b"mem 1\n")
    if (yield from peer.receive()) is None:  # the first answer may take a while
        return
    peer.read_nothing()
    yield from peer.send(b"mem 400000\n")
    yield lambda: False, 130.0
    while (yield from peer.receive(timeout_s=0)) is not None:
        pass
    assert peer.ended, f"{peer} has read nothing for 130 s, and is still connected"


def blobs(rng: Random) -> Workload:
    """Make answers that are larger than the network's buffers, for clients that read slowly or not at all."""
    handler = rng.choice([Blobs, AsyncBlobs])
    clients = []
    for _ in range(rng.randrange(1, 5)):
        client = Client()
        for _ in range(rng.randrange(5)):
            verb, count = rng.choice([b"mem", b"file"]), rng.choice([0, 1, 5000, 70_000, 250_000])
            if rng.random() < 0.4:
                client.read_nothing()
            client.send(b"%b %d\n" % (verb, count)).pause(rng.choice([0, 1, 30]))
            client.expect(blob(count))
        if rng.random() < 0.2:
            clients.append(client.then(_never_reads))
        else:
            client.send(b"mem 1\n").expect(blob(1))
            clients.append(finish(rng, client, b"mem 100000\n", b"", 300))

    def make() -> Any:
        return type(handler.__name__, (handler,), {"path": blob_file()})

    # with buffers of a few bytes these answers would take hours
    faults = replace(choose_faults(rng, **HARSH), small_buffer=0.0)
    return Workload(f"blobs {handler.__name__}", make_server(rng, make), clients, faults, nothing_more)


def fails(rng: Random) -> Workload:
    """Make requests that fail while others are served, at every place where the engine calls other code."""
    dispatch = rng.choice(["inline", "pool"])
    config = choose_config(rng)
    watched = type("Failing", (Watched, failing.Failing), {})
    return Workload(
        "failing",
        lambda: failing.server(dispatch, config, watched),
        failing.clients(rng),
        choose_faults(rng),
        failing.check,
    )


def leaves(rng: Random) -> Workload:
    """Make clients that reset their connections while their requests wait for a timer or a call."""
    handler = rng.choice(leaving.HANDLERS)
    clients = leaving.clients(rng)
    server = make_server(rng, lambda: handler)
    return Workload(f"leaving {handler.__name__}", server, clients, choose_faults(rng, **HARSH), leaving.check)


def spoiled(rng: Random) -> Workload:
    """Make requests that end early, because the client disconnects or the handler fails."""
    return rng.choice([departing, fails, leaves])(rng)


PROTOCOLS = [echo, notes, miniredis, tftp, chat, killing, cancelled, blobs, spoiled, *upstreams.PROTOCOLS]
