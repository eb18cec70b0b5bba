"""The workloads of the simulated hand-over: what a seed decides, and what each client must see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from types import SimpleNamespace
from typing import Any

import reqtable
from reqtable.config import Config, RestartOptions
from reqtable.handover.outcome import Phase
from reqtable.testing import Client, Faults, Peer, Report, SimulationFailed, Upstream
from tests.simulation.handlers import blob
from tests.simulation.handover.handlers import UPSTREAM, Ledger, Lines, Pings, SharedLines
from tests.simulation.handover.process import Blow, Plan, SimProcess, World
from tests.simulation.shared import Dialogue, Unchecked, choose_faults, choose_limits, play_dialogue, silent
from tests.simulation.upstreams import answering

TCP, UDP = ("127.0.0.1", 7000), ("127.0.0.1", 7001)
_STREAM, _DATAGRAM, _INET = 1, 2, 2
_GIVERS = ("Offer", "Rehearse", "Send", "Send", "Share", "Commit", "Commit", "Listen", "Done", "Abort")
_TAKERS = ("Hello", "Ready", "Rehearsed", "Prepared", "Prepared", "Prepared", "Shared", "Listening")
_HANGS_S = (0.5, 3.0, 11.0)


@dataclass
class Case:
    """Describes one simulation that can be run."""

    seed: int
    plan: Plan
    config: Config
    faults: Faults
    handler: type[Lines]
    has_datagrams: bool
    refuses_records: int | None  # at which migration of the second process a record is refused
    fails_rehearsal: bool
    clients: list[tuple[float, Client, bytes | None]] = field(default_factory=list)  # with all that a client may get
    chatters: dict[int, bytes] = field(default_factory=dict)  # the names of the clients that write to each other
    pingers: set[int] = field(default_factory=set)


def run(seed: int, only: Sequence[str] | None = None) -> tuple[str, Report]:
    """Simulate the hand-over of a seed; `only` names the faults that may happen. Raises SimulationFailed."""
    case = case_of(seed)
    faults = case.faults if only is None else case.faults.restricted_to(only)
    world = World(
        seed, case.plan, case.config, faults, lambda process, sockets: _servers(case, ledger, process, sockets)
    )
    ledger = Ledger(world)
    world.has_lost_sessions = case.refuses_records is not None  # those that stay receive nothing more
    peers = []
    for number, (at, client, _) in enumerate(case.clients):
        is_ping = number in case.pingers
        where = (UDP, _DATAGRAM, _INET) if is_ping else (TCP, _STREAM, _INET)
        peers.append((at, Peer(world.network, number, client), where))
    upstream = Upstream(UPSTREAM, lambda _: answering(lambda asked: b"up " + asked, Random(seed), 3.0))
    report = world.run(peers, [upstream])
    report.problems += _wrong(case, ledger, report)
    if report.problems:
        raise SimulationFailed(report)
    return name_of(case), report


def name_of(case: Case) -> str:
    """Return in a word what happens in a simulation."""
    plan = case.plan
    if plan.blows:
        blow = plan.blows[0]
        return f"{'kill' if blow.hang_s is None else 'hang'} {blow.when} {blow.message}"
    for name, is_so in (
        ("refusal", plan.refuses),
        ("descriptors", plan.lacks_room is not None),
        ("end", plan.ends_at is not None),
        ("record", case.refuses_records is not None),
        ("rehearsal", case.fails_rehearsal),
    ):
        if is_so:
            return name
    return "restart"


def case_of(seed: int) -> Case:
    rng = Random(seed)
    limits = choose_limits(rng, drain_timeout_s=20.0)
    plan = Plan(
        restarts_at=sorted(rng.uniform(0.2, 6) for _ in range(rng.choice([1, 1, 1, 2]))),
        slice_rows=rng.choice([1, 2, 3, 250]),
        unmovable=rng.choice(["drain", "drain", "drain", "refuse"]),
        start_s=rng.choice([0.01, 0.3, 1]),
        lateness=rng.choice([0.0, 0.0, 0.1, 0.7]),
        packet_bytes=rng.choice([300, 3000, 32_768]),
        packet_descriptors=rng.choice([1, 2, 250]),
        cancels=rng.choice([0, 0, 0, 3]),
    )
    if rng.random() < 0.3:
        plan.restarts_at.append(rng.uniform(8, 14))
    elif rng.random() < 0.3:
        plan.restarts_at.append(plan.restarts_at[0] + plan.start_s + rng.uniform(0, 0.5))
    case = Case(
        seed,
        plan,
        Config(
            limits=limits,
            restart=RestartOptions(slice_rows=plan.slice_rows, unmovable=plan.unmovable, start_timeout_s=5.0),
        ),
        replace(choose_faults(rng), stalled=0.0),  # a process stands still as the plan says
        rng.choice([Lines, Lines, SharedLines]),
        rng.random() < 0.4,
        None,
        False,
    )
    _choose_trouble(rng, case)
    _choose_clients(rng, case)
    return case


def _choose_trouble(rng: Random, case: Case) -> None:
    plan = case.plan
    how = rng.randrange(14)
    if how <= 8:
        generation = rng.choice([1, 1, 2, 2, 3])
        gives = generation == 1 or rng.random() < 0.1
        sends = rng.random() < 0.5
        message = rng.choice(_GIVERS if sends is gives else _TAKERS)
        when = f"{rng.choice(['before', 'after'])} {'send' if sends else 'receive'}"
        hang_s = None if rng.random() < 0.6 else rng.choice(_HANGS_S)
        plan.blows.append(Blow(generation, when, message, rng.choice([0, 0, 0, 1, 2, 5]), hang_s))
    elif how == 9:
        plan.refuses = True
    elif how == 10:
        plan.lacks_room = rng.randrange(8)
    elif how == 11:
        plan.ends_at = plan.restarts_at[0] + plan.start_s + rng.uniform(0, rng.choice([0.01, 1]))
    elif how == 12:
        case.refuses_records = rng.randrange(6)
        case.fails_rehearsal = rng.random() < 0.3


def _choose_clients(rng: Random, case: Case) -> None:
    count = rng.randrange(2, 9)
    chatters = [number for number in range(count) if rng.random() < 0.5]
    case.chatters = {number: b"client%d" % number for number in chatters}
    for number in range(count):
        at = rng.uniform(0, 3)
        if number in case.chatters:
            case.clients.append((at, _chatter(rng, case, number), None))
        elif case.has_datagrams and rng.random() < 0.5:
            case.pingers.add(number)
            case.clients.append((at, *_pinger(rng)))
        else:
            case.clients.append((at, *_plain(rng, number)))
    for number in range(count, count + rng.choice([0, 3, 10])):  # clients of one request each
        text = b"hello client%d plain\nadd %d\nbye\n" % (number, number)
        answer = b"hello client%d\ntotal %d of 1\nbye\n" % (number, number)
        client = Client().send(text).expect(answer).expect_end()
        case.clients.append((rng.uniform(0, 12), client, answer))


def _plain(rng: Random, number: int) -> tuple[Client, bytes]:
    """Make a client whose answers depend on it alone. Returns it with all of them."""
    dialogue: Dialogue = [(b"hello client%d plain\n" % number, b"hello client%d\n" % number)]
    total, count = 0, 0
    for _ in range(rng.randrange(1, 14)):
        verb = rng.choice(["add", "add", "add", "take", "big", "nap", "call", "ask", "ask"])
        if verb == "add":
            value = rng.randrange(100)
            total, count = total + value, count + 1
            dialogue.append((b"add %d\n" % value, b"total %d of %d\n" % (total, count)))
        elif verb == "take":
            data = rng.randbytes(rng.choice([1, 30, 3000]))
            total += sum(data)
            dialogue.append((b"take %d\n%b" % (len(data), data), b"took %d, total %d\n" % (len(data), total)))
        elif verb == "big":
            size = rng.choice([10, 1000, 10_000, 50_000])
            dialogue.append((b"big %d\n" % size, blob(size) + b"\n"))
        elif verb == "nap":
            dialogue.append((b"nap %d\n" % rng.randrange(1, 30), b"woke\n"))
        elif verb == "call":
            dialogue.append((b"call abc\n", b"called 3\n"))
        else:
            text = b"what%d" % rng.randrange(10)
            dialogue.append((b"ask %b\n" % text, b"up %b\n" % text))
    answers = b"".join(answer for _, answer in dialogue)
    client = play_dialogue(rng, dialogue, 4)
    how = rng.randrange(6)
    if how == 0:
        return client.reset(), answers
    if how == 1:
        return client.end().expect_end(), answers
    if how == 2:
        return client, answers
    if how == 3:
        client.send(b"add 0\n").expect(b"total %d of %d\n" % (total, count + 1))
        return client.then(silent(40)), answers + b"total %d of %d\n" % (total, count + 1)
    return client.send(b"bye\n").expect(b"bye\n").expect_end(), answers + b"bye\n"


def _pinger(rng: Random) -> tuple[Client, None]:
    client = Client()
    number = 0
    for _ in range(rng.randrange(1, 5)):
        for _ in range(rng.choice([1, 1, 3])):
            number += 1
            client.send(b"ping%d" % number).expect(b"%d ping%d" % (number, number))
        client.pause(rng.uniform(0, 4))
    return client, None


def _chatter(rng: Random, case: Case, number: int) -> Client:
    """Make a client that writes to others by way of their requests."""
    name = case.chatters[number]
    client = Client().may_fail().send(b"hello %b chat\n" % name)
    others = [each for each in case.chatters.values() if each != name] or [name]
    for place in range(rng.choice([1, 5, 20])):
        verb = rng.choice([b"tell", b"poke"])
        text = b"%b.%d" % (name, place)
        client.send(b"%b %b %b\n" % (verb, rng.choice(others), text))
        if rng.random() < 0.5:
            client.pause(rng.uniform(0, 1.5))
        if rng.random() < 0.1:
            client.read_nothing(rng.uniform(0, 3))
    client.pause(rng.choice([1, 10]))
    return client.send(b"bye\n").take_rest()


# -- the servers of a process ------------------------------------------------------------------------------------------


class _Stream(Unchecked, reqtable.TCPServer):
    served = 0
    _is_given_away = False


class _Datagrams(Unchecked, reqtable.UDPServer):
    served = 0
    _is_given_away = False


def _servers(case: Case, ledger: Ledger, process: SimProcess, sockets: dict[str, int]) -> list[Any]:
    process.migrates = _migrations(case, process)  # type: ignore[attr-defined]
    made = []
    for kind, address, handler in ((_Stream, TCP, case.handler), (_Datagrams, UDP, Pings)):
        if kind is _Datagrams and not case.has_datagrams:
            continue
        own = type(
            handler.__name__, (handler,), {"process": process, "ledger": ledger, "state_version": process.generation}
        )
        key = kind.__name__
        server = kind(address, own, bind_and_activate=not sockets, config=case.config)
        if sockets:
            server.socket.close()
            server.socket = process.world.network.socket(fileno=sockets[key])
        else:
            server._owns_queue = True
        server._endpoint = SimpleNamespace(key=key)  # type: ignore[attr-defined]
        made.append(server)
    return made


def _migrations(case: Case, process: SimProcess) -> Any:
    """Return what is called for each record that a process reads: it may refuse one."""
    left = case.refuses_records

    def migrates(versions: int) -> None:
        nonlocal left
        if left is None or process.generation != 2:
            return
        is_rehearsal = not process._points["before receive", "Send"]
        if is_rehearsal and not case.fails_rehearsal:
            return
        left -= 1
        if left < 0:
            left = None
            raise ValueError("this code can't go on with it")

    return migrates


# -- what must be so in the end ----------------------------------------------------------------------------------------


def _wrong_restarts(case: Case, world: World) -> Iterator[str]:
    """Say which restarts did not do what they should: without trouble, each is done, and no request is refused."""
    plan = case.plan
    if plan.blows or plan.refuses or plan.lacks_room is not None or plan.ends_at is not None:
        return
    for process in world.processes:
        giver = process.restart._giver if process.restart is not None else None
        if giver is None or case.fails_rehearsal:
            continue
        outcome = giver.outcome
        if case.refuses_records is None and outcome.refused:
            yield f"{process} kept requests, because {outcome.refused}"
        was_late = "has not answered" in outcome.problem  # many small packets, and processes that are held up
        if outcome.phase is Phase.FAILED and not (
            was_late or (plan.unmovable == "refuse" and "can't move" in outcome.problem)
        ):
            yield f"the restart of {process} has failed, because {outcome.problem}"


def _wrong(case: Case, ledger: Ledger, report: Report) -> Iterator[str]:
    yield from _wrong_restarts(case, ledger.world)
    for number, peer in enumerate(report.clients):
        whole = case.clients[number][2]
        if whole is not None and not whole.startswith(peer.received):
            yield f"{peer} received {peer.received!r}, which is no beginning of {whole!r}"
        if number in case.pingers and not (peer.was_hit or ledger.world.has_lost_sessions):
            numbers = [int(each.split()[0]) for each in peer.datagrams]
            if numbers != list(range(1, len(numbers) + 1)):
                yield f"{peer} received the answers {numbers}"
        if number in case.chatters:
            yield from _wrong_chat(case, ledger, peer, case.chatters[number])


def _wrong_chat(case: Case, ledger: Ledger, peer: Peer, name: bytes) -> Iterator[str]:
    is_whole = peer.ended == "end" and not peer.was_hit and name not in ledger.world.lossy
    lines = peer.received.splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        if is_whole:
            yield f"{peer} received half a line: {lines[-1]!r}"
        lines.pop()
    told = [each[5:-1] for each in lines if each.startswith(b"told ")]
    poked = [each[6:-1] for each in lines if each.startswith(b"poked ") and each != b"poked them\n"]
    for got, sent in ((told, ledger.taken[name]), (poked, ledger.poked[name])):
        left = iter(sent)
        if not all(each in left for each in got):
            yield f"{peer} received {got} of {sent}"
    if not is_whole:
        return
    asked = sum(step == "send" for step, _ in case.clients[peer.number][1].steps)
    answers = sum(each in (b"taken\n", b"refused\n", b"nobody\n", b"poked them\n") for each in lines)
    if answers != asked - 2 or lines[:1] != [b"hello %b\n" % name] or b"bye\n" not in lines:
        yield f"{peer} received {answers} answers to {asked - 2} lines: {lines}"
    if len(told) != ledger.heard[name]:
        yield f"{peer} received {told} of {ledger.heard[name]} messages"
    if poked != ledger.poked[name][: len(poked)]:
        yield f"{peer} received {poked}, but was sent {ledger.poked[name]}"
