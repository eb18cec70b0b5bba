"""The workloads that reach out: forwarders, races of upstreams, messages, clients that leave, kept connections."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from reqtable.loop.platform import SYSTEM
from reqtable.testing import Client, Peer, Report, Upstream, UpstreamPeer
from tests.simulation import reaching
from tests.simulation.shared import HARSH, Workload, choose_faults, make_server, send_in_pieces

UNRELIABLE = {**HARSH, "refused": 0.05, "unanswered": 0.03, "unresolved": 0.05}
Play = Callable[[Peer], Any]


# -- shared ----------------------------------------------------------------------------------------------------------


@dataclass
class Target:
    """Is where a server connects to: an address, what listens there, and whether anything does."""

    address: str
    upstreams: list[Upstream]
    names: dict[str, list[str]]
    is_up: bool = True


def target_of(rng: Random, script: Any, host: int = 1) -> Target:
    """Choose an upstream: at a number, a path or a name whose first addresses may be dead; or none at all."""
    four, six, port = f"192.0.2.{host}", f"2001:db8::{host}", 7
    how = rng.randrange(8)
    answers_after_s = rng.choice([0, 0, 0.1, 2])
    here = Upstream(f"tcp://{four}:{port}", script, answers_after_s=answers_after_s)
    there = Upstream(f"tcp://[{six}]:{port}", script, answers_after_s=rng.choice([0, 0.5]))
    silent = Upstream(f"tcp://[{six}]:{port}", answers_after_s=None)
    name, named = f"up{host}.example", f"tcp://up{host}.example:{port}"
    if how == 0:
        return Target(f"unix:///run/up{host}.sock", [Upstream(f"unix:///run/up{host}.sock", script)], {})
    if how == 1:
        return Target(named, [here, there], {name: [six, four]})
    if how == 2:
        return Target(named, [here], {name: [f"{six}0", six, four]})  # two refuse
    if how == 3:
        return Target(named, [here, silent], {name: [six, four]})
    if how == 4:
        return rng.choice(
            [
                Target(named, [silent], {name: [six]}, False),
                Target(named, [], {name: [six, four]}, False),
                Target(named, [], {}, False),
                Target(here.address, [], {}, False),
            ]
        )
    return Target(here.address, [here], {})


def with_target(handler: Any, **attributes: Any) -> Any:
    return type(handler.__name__, (handler,), attributes)


def was_hit(report: Report) -> bool:
    """Return whether a fault may have changed what anybody saw."""
    return report.were_upstreams_hit or any(peer.was_hit for peer in report.clients)


def lines(peer: Peer) -> list[bytes]:
    return peer.received.splitlines(keepends=True)


def _has_line(peer: Peer, done: int) -> tuple[Callable[[], bool], float | None]:
    """Return what a script yields to wait for one more line than `done`, or for the end."""
    return lambda: bool(peer.ended) or peer.received.count(b"\n") > done, None


def answering(answer: Callable[[bytes], bytes], rng: Random, slow_s: float = 0.5) -> Client:
    """Make an upstream that answers each line, after a while."""
    delays = [rng.choice([0, 0, rng.uniform(0, slow_s)]) for _ in range(20)]

    def play(peer: Peer) -> Any:
        done = 0
        while True:
            yield _has_line(peer, done)
            asked = lines(peer)
            if done >= len(asked) or not asked[done].endswith(b"\n"):
                return
            yield lambda: peer.ended == "reset", delays[done % len(delays)]
            yield from peer.send(answer(asked[done]))
            done += 1

    return Client().may_fail().then(play)


def watching(make: Callable[[], Any], look: Callable[[Any], None]) -> Callable[[], Any]:
    """Make the same server, and look at it after each pass."""

    def server() -> Any:
        made = make()
        made.service_actions = lambda: look(made)
        return made

    return server


# -- a forwarder -----------------------------------------------------------------------------------------------------


def forward(rng: Random) -> Workload:
    """Make clients and upstreams that send to each other through the server, at their own pace, up to the end."""
    handler = rng.choice([reaching.Forward, reaching.AsyncForward])
    count = rng.randrange(1, 6)
    is_big = rng.random() < 0.3
    breaks = rng.random() < 0.2
    sizes = [0, 3000, 100_000, 200_000] if is_big else [0, 1, 50, 3000]
    ours, theirs = ([rng.randbytes(rng.choice(sizes)) for _ in range(count)] for _ in range(2))
    their_plays = [_side(rng, data, breaks) for data in theirs]

    def serve(peer: Peer) -> Any:
        yield lambda: b"\n" in peer.received or bool(peer.ended), None
        if b"\n" in peer.received:
            yield from their_plays[int(peer.received.partition(b"\n")[0])](peer)

    target = target_of(rng, Client().may_fail().then(serve))
    clients = [
        Client().may_fail().pause(rng.choice([0, 0, 1])).then(_side(rng, b"%d\n" % number + data, breaks))
        for number, data in enumerate(ours)
    ]
    broken: list[str] = []
    # much input at a time, and little room for it
    greedy = {"recv_bytes": 65_536, "steps_per_pass": 64, "high_water_bytes": rng.choice([1, 200, 5000])}
    limits = greedy if is_big and rng.random() < 0.7 else {}
    server = watching(
        make_server(rng, lambda: with_target(handler, target=target.address), **limits),
        lambda made: _look_at(made, broken),
    )
    faults = choose_faults(rng, **UNRELIABLE)
    if is_big:
        faults = replace(faults, small_buffer=0.0)

    def check(report: Report) -> Iterator[str]:
        yield from broken[:3]
        is_exact = not was_hit(report) and not breaks
        seen = {peer.received.partition(b"\n")[0]: peer for peer in report.upstreams if b"\n" in peer.received}
        if len(seen) < sum(b"\n" in peer.received for peer in report.upstreams):
            yield "two connections began with the same client"
        for number, peer in enumerate(report.clients):
            wanted = theirs[number] if target.is_up else b"-failed\n"
            may_fail = not is_exact and b"-failed\n".startswith(peer.received)
            # A client that goes on sending when its request has failed is reset in the end, perhaps before it reads.
            may_reset = not target.is_up and peer.ended == "reset"
            if is_exact and not may_reset and (peer.received != wanted or peer.ended != "end"):
                yield f"{peer} received {len(peer.received)} of {len(wanted)} bytes, then {peer.ended or 'nothing'}"
            elif not wanted.startswith(peer.received) and not may_fail:
                yield f"{peer} received other bytes than its upstream sent"
            upstream, wanted = seen.get(b"%d" % number), b"%d\n" % number + ours[number]
            if upstream is not None and not wanted.startswith(upstream.received):
                yield f"{upstream} received other bytes than {peer} sent"
            if is_exact and target.is_up and (upstream is None or upstream.received != wanted):
                yield f"{upstream} received {len(upstream.received) if upstream else 0} of {len(wanted)} bytes"

    return Workload(f"forward {handler.__name__}", server, clients, faults, check, target.upstreams, target.names)


def _side(rng: Random, data: bytes, breaks: bool) -> Play:
    """Make one side of a forwarded connection: it sends `data` in pieces, ends, and waits for the other's end."""
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.choice([0, 1, 3, 8])))
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True) if a < b]
    pauses = [rng.choice([0, 0, 0, rng.uniform(0, 3)]) for _ in pieces]
    silences = [rng.choice([0, 0, rng.uniform(1, 15)]) for _ in pieces]
    breaks_at = rng.randrange(len(pieces) + 1) if breaks and rng.random() < 0.5 else None

    def play(peer: Peer) -> Any:
        for number, piece in enumerate(pieces):
            if number == breaks_at:
                peer.reset()
                return
            if silences[number]:
                peer.read_nothing(silences[number])
            yield from peer.send(piece)
            if pauses[number]:
                yield lambda: peer.ended == "reset", pauses[number]
        peer.end()
        yield lambda: bool(peer.ended), None

    return play


def _look_at(server: Any, broken: list[str]) -> None:
    """Check that a forwarder holds at most the high-water mark and what it takes at once, in each direction."""
    limits = server.table.limits
    for entry in server.table:
        if entry.reach is None:
            continue
        for side in [entry, *entry.reach.connections]:
            held, unread = side.output.held, len(side.input)
            if held > limits.high_water_bytes + reaching.PIECE_BYTES or unread > limits.recv_bytes:
                broken.append(f"{side!r} holds {held} bytes of output and {unread} of input")


# -- races -----------------------------------------------------------------------------------------------------------


def race(rng: Random) -> Workload:
    """Make clients whose requests ask the first of two upstreams that answers, or both."""
    handler = rng.choice([reaching.Race, reaching.AsyncRace])
    targets = [
        target_of(rng, answering(lambda text, name=name: name + text, rng), host)  # type: ignore[misc]
        for host, name in ((1, b"A:"), (2, b"B:"))
    ]
    asked: list[list[bytes]] = []
    clients = []
    for number in range(rng.randrange(1, 6)):
        verbs = [rng.choice([b"", b"", b"both "]) for _ in range(rng.randrange(1, 5))]
        asked.append([b"%b%d.%d\n" % (verb, number, place) for place, verb in enumerate(verbs)])
        client = Client().may_fail().pause(rng.choice([0, 0, 1]))
        for text in asked[-1]:
            send_in_pieces(rng, client, text)
            if rng.random() < 0.5:
                client.pause(rng.uniform(0, 30))
        clients.append(client.end().take_rest() if rng.random() < 0.8 else client.pause(1).reset())
    ups = [name for name, target in zip((b"A:", b"B:"), targets, strict=True) if target.is_up]

    def check(report: Report) -> Iterator[str]:
        is_exact = not was_hit(report)
        for peer, texts in zip(report.clients, asked, strict=True):
            error = _wrong_race(lines(peer), texts, ups, is_exact, is_exact and peer.script.steps[-1][0] != "reset")
            if error:
                yield f"{peer}, who asked {texts}, received {peer.received!r}: {error}"
        for upstream in report.upstreams:
            others = [text for text in lines(upstream) if not any(text in each for each in asked)]
            if others and is_exact:
                yield f"{upstream} received {others}, which nobody has asked"

    faults = choose_faults(rng, **UNRELIABLE)
    server = make_server(rng, lambda: with_target(handler, targets=tuple(target.address for target in targets)))
    upstreams = [each for target in targets for each in target.upstreams]
    names = targets[0].names | targets[1].names
    return Workload(f"race {handler.__name__}", server, clients, faults, check, upstreams, names)


def _wrong_race(got: list[bytes], texts: list[bytes], ups: list[bytes], is_exact: bool, is_whole: bool) -> str:
    """Return what is wrong with the answers to one client, or nothing."""
    if got and not got[-1].endswith(b"\n"):
        got = got[:-1]
    for text in texts:
        if not got:
            return "an answer is missing" if is_whole else ""
        answer = got.pop(0)
        good = [name + text for name in ups]
        if answer == b"-failed\n" or (answer == b"-late\n" and not is_exact):
            if is_exact and len(ups) > text.startswith(b"both "):
                return f"{text!r} failed"
        elif answer not in good:
            return f"{answer!r} is no answer to {text!r}"
        elif text.startswith(b"both "):
            good.remove(answer)
            if not got:
                return "the second answer is missing" if is_whole else ""
            if got[0] not in good and (is_exact or got[0].endswith(text)):
                return f"{got[0]!r} is not the other answer to {text!r}"
            if got[0] in good:
                got.pop(0)
    return f"{got} is too much" if got else ""


# -- messages --------------------------------------------------------------------------------------------------------


def publish(rng: Random) -> Workload:
    """Make clients that tell each other what they say."""
    handler = rng.choice([reaching.Publish, reaching.AsyncPublish])
    count = rng.randrange(2, 6)
    rooms: list[reaching.Room] = []
    said = []
    clients = []
    for number in range(count):
        client = Client().may_fail().pause(rng.choice([0, 0, 2])).send(b"client%d\n" % number).expect(b"hello\n")
        texts = [
            b"client%d text %d of %d%b\n" % (rng.randrange(count), place, number, b"!" * rng.choice([0, 0, 200]))
            for place in range(rng.choice([0, 5, 40]))
        ]
        said.append(len(texts))
        if rng.random() < 0.3:
            client.read_nothing(20)
        if rng.random() < 0.5:
            client.send(b"".join(texts))
        else:
            for text in texts:
                send_in_pieces(rng, client, text)
                if rng.random() < 0.2:
                    client.pause(rng.uniform(0, 5))
        client.pause(rng.choice([0, 100, 300]))
        clients.append(client.reset() if rng.random() < 0.15 else client.send(b"bye\n").take_rest())

    def make() -> Any:
        rooms[:] = [reaching.Room(SYSTEM.get().clock)]
        return with_target(handler, room=rooms[0])

    def check(report: Report) -> Iterator[str]:
        [room] = rooms
        is_exact = not was_hit(report)
        if is_exact and room.latest_s > 60:
            yield f"a message was heard after {room.latest_s:.0f} s"
        for number, peer in enumerate(report.clients):
            name = b"client%d" % number
            got = [text.removeprefix(b"told ").strip() for text in lines(peer) if text.startswith(b"told ")]
            heard = room.heard[name]
            is_whole = is_exact and peer.ended == "end"
            if is_whole and got != heard:
                yield f"{peer} received {got} of {heard}"
            elif got[:-1] != heard[: max(0, len(got) - 1)]:
                yield f"{peer} received {got}, which is no beginning of {heard}"
            answers = [text for text in lines(peer) if text in (b"taken\n", b"refused\n", b"nobody\n")]
            if is_whole and len(answers) != said[number]:
                yield f"{peer} received {len(answers)} answers to {said[number]} lines"

    limits = {"told_max": rng.choice([1, 3, 1000])}
    server = make_server(rng, make, **limits)
    return Workload(f"publish {handler.__name__}", server, clients, choose_faults(rng, **HARSH), check)


# -- clients that leave ----------------------------------------------------------------------------------------------


def leave(rng: Random) -> Workload:
    """Make clients that leave while their requests wait for an upstream, which must learn of it soon."""
    handler = rng.choice([reaching.Patient, reaching.AsyncPatient])
    left_at: dict[bytes, float] = {}
    asked_at: dict[bytes, float] = {}  # a full table may keep a client waiting until it has left
    gone_at: dict[bytes, float] = {}

    def serve(peer: Peer) -> Any:
        yield lambda: b"\n" in peer.received or bool(peer.ended), None
        name = peer.received.strip()
        asked_at[name] = peer.network.clock.now
        yield lambda: bool(peer.ended), 100
        if peer.ended:
            gone_at[name] = peer.network.clock.now
        else:
            yield from peer.send(b"answer " + peer.received)

    def leaving(name: bytes, how: str, after_s: float) -> Play:
        def play(peer: Peer) -> Any:
            yield lambda: bool(peer.received or peer.ended), after_s
            left_at[name] = peer.network.clock.now
            if how != "stay":
                peer.reset() if how == "reset" else peer.end()
            yield lambda: bool(peer.ended), None

        return play

    target = target_of(rng, Client().may_fail().then(serve))
    clients, ways = [], []
    for number in range(rng.randrange(1, 7)):
        ways.append(rng.choice(["end", "reset", "stay"]))
        name = b"client%d" % number
        client = Client().may_fail().pause(rng.choice([0, 0, 1])).send(name + b"\n")
        clients.append(client.then(leaving(name, ways[-1], rng.uniform(0, 90))))

    def check(report: Report) -> Iterator[str]:
        if was_hit(report):
            return
        for number, peer in enumerate(report.clients):
            name = b"client%d" % number
            wanted = b"answer " + name + b"\n" if target.is_up else b"-failed\n"
            if ways[number] == "stay" and peer.received != wanted:
                yield f"{peer} received {peer.received!r} instead of {wanted!r}"
            if not wanted.startswith(peer.received):
                yield f"{peer} received {peer.received!r}"
            seen = [each for each in report.upstreams if each.received.strip() == name]
            if ways[number] != "stay" and not peer.received and seen:
                late_s = gone_at.get(name, float("inf")) - max(left_at[name], asked_at[name])
                if late_s > 5:
                    yield f"{peer} left, and its upstream learned of it {late_s:.0f} s later"

    server = make_server(rng, lambda: with_target(handler, target=target.address))
    faults = choose_faults(rng, **UNRELIABLE)
    return Workload(f"leave {handler.__name__}", server, clients, faults, check, target.upstreams, target.names)


# -- connections that are kept ---------------------------------------------------------------------------------------


def keep(rng: Random) -> Workload:
    """Make clients whose requests use the same few connections, one after the other."""
    handler = rng.choice([reaching.Keep, reaching.AsyncKeep])
    idle_s = rng.choice([0.5, 10, 60])
    most = rng.choice([None, 1, 3])  # lines that the upstream answers on one connection
    ends: dict[UpstreamPeer, tuple[float, float]] = {}  # when a connection was last used, and when it ended

    def serve(peer: Peer) -> Any:
        assert isinstance(peer, UpstreamPeer)
        done = 0
        used_at = peer.network.clock.now
        while done != most:
            yield _has_line(peer, done)
            asked = lines(peer)
            if done >= len(asked):
                ends[peer] = used_at, peer.network.clock.now
                return
            yield from peer.send(b"answer " + asked[done])
            used_at = peer.network.clock.now
            done += 1

    target = target_of(rng, Client().may_fail().then(serve))
    asked: list[list[bytes]] = []
    clients = []
    for number in range(rng.randrange(1, 6)):
        asked.append([b"%d.%d\n" % (number, place) for place in range(rng.randrange(1, 8))])
        client = Client().may_fail().pause(rng.choice([0, 0, 1]))
        for text in asked[-1]:
            send_in_pieces(rng, client, text)
            client.pause(rng.choice([0, 0, rng.uniform(0, 5), 70]))
        clients.append(client.end().take_rest())

    def check(report: Report) -> Iterator[str]:
        is_exact = not was_hit(report)
        for peer, texts in zip(report.clients, asked, strict=True):
            wanted = [b"answer " + text if target.is_up else b"-failed\n" for text in texts]
            if is_exact and lines(peer) != wanted:
                yield f"{peer} received {lines(peer)} instead of {wanted}"
            for got, want in zip(lines(peer)[:-1], wanted, strict=False):
                if got not in (want, b"-failed\n"):
                    yield f"{peer} received {got!r} instead of {want!r}"
        for upstream, (used_at, ended_at) in ends.items():
            if is_exact and ended_at - used_at > idle_s + 5:
                yield f"{upstream} was kept for {ended_at - used_at:.1f} s, not for {idle_s} s"
        is_steady = len(clients) == 1 and most is None and idle_s == 60 and ("pause", (70,)) not in clients[0].steps
        if is_exact and is_steady and len(report.upstreams) > 1 == len(target.upstreams):
            yield f"one client used {len(report.upstreams)} connections, one after the other"

    limits: dict[str, Any] = {"connections_idle_s": idle_s}
    server = make_server(rng, lambda: with_target(handler, target=target.address), **limits)
    faults = choose_faults(rng, **UNRELIABLE)
    return Workload(f"keep {handler.__name__}", server, clients, faults, check, target.upstreams, target.names)


# -- the last output -------------------------------------------------------------------------------------------------


def deliver(rng: Random) -> Workload:
    """Make clients whose requests end before their upstreams have taken all that was sent to them."""
    handler = rng.choice([reaching.Deliver, reaching.AsyncDeliver])
    is_big = rng.random() < 0.5
    sent = [
        b"%d\n" % number + rng.randbytes(rng.choice([0, 150_000, 200_000] if is_big else [0, 3000, 5000]))
        for number in range(rng.randrange(1, 5))
    ]
    silence_s = rng.choice([0, 0, 5, 20])

    def serve(peer: Peer) -> Any:
        if silence_s:
            peer.read_nothing(silence_s)
        yield lambda: bool(peer.ended), None

    target = target_of(rng, Client().may_fail().then(serve))
    clients = [Client().may_fail().pause(rng.choice([0, 1])).send(data).end().take_rest() for data in sent]

    def check(report: Report) -> Iterator[str]:
        is_exact = not was_hit(report)
        for number, (peer, data) in enumerate(zip(report.clients, sent, strict=True)):
            seen = [each.received for each in report.upstreams if each.received.startswith(b"%d\n" % number)]
            wanted = b"on its way\n" if target.is_up else b"-failed\n"
            if is_exact and peer.received != wanted:
                yield f"{peer} received {peer.received!r} instead of {wanted!r}"
            if is_exact and target.is_up and seen != [data]:
                yield f"of the {len(data)} bytes of {peer}, its upstream received {[len(each) for each in seen]}"
            if any(not data.startswith(each) for each in seen):
                yield f"an upstream received other bytes than {peer} sent"

    server = make_server(rng, lambda: with_target(handler, target=target.address))
    faults = replace(choose_faults(rng, **UNRELIABLE), small_buffer=0.0 if is_big else 0.6)
    return Workload(f"deliver {handler.__name__}", server, clients, faults, check, target.upstreams, target.names)


# -- datagrams -------------------------------------------------------------------------------------------------------


def resolve(rng: Random) -> Workload:
    """Make clients whose requests ask an upstream by datagrams."""
    handler = rng.choice([reaching.Resolve, reaching.AsyncResolve])
    is_up = rng.random() < 0.85

    def serve(peer: Peer) -> Any:
        while (asked := (yield from peer.receive(timeout_s=60))) is not None:
            yield from peer.send(b"answer " + asked)

    where = rng.choice(["192.0.2.3", "[2001:db8::3]"])
    upstreams = [Upstream(f"udp://{where}:53", Client().may_fail().then(serve))] if is_up else []
    named = rng.random() < 0.5
    names = {"up.example": [where.strip("[]")]}
    asked: list[list[bytes]] = []
    clients = []
    for number in range(rng.randrange(1, 5)):
        asked.append([b"%d.%d\n" % (number, place) for place in range(rng.randrange(1, 5))])
        client = Client().may_fail()
        for text in asked[-1]:
            send_in_pieces(rng, client, text)
            client.pause(rng.choice([0, 0, rng.uniform(0, 5)]))
        clients.append(client.end().take_rest())

    def check(report: Report) -> Iterator[str]:
        is_exact = not was_hit(report)
        for peer, texts in zip(report.clients, asked, strict=True):
            wanted = [b"answer " + text if is_up else b"-failed\n" for text in texts]
            if is_exact and lines(peer) != wanted:
                yield f"{peer} received {lines(peer)} instead of {wanted}"

    server = make_server(rng, lambda: with_target(handler, target=f"udp://{'up.example' if named else where}:53"))
    harsh = {"lost": 0.1, "repeated": 0.1, "reordered": 0.1}
    # A datagram socket connects to any address, so the handler can't know that an address is wrong.
    faults = replace(choose_faults(rng, **HARSH, **harsh, **{"unresolved": 0.05}), misdirected=0.0)
    return Workload(f"resolve {handler.__name__}", server, clients, faults, check, upstreams, names)


def reach_out(rng: Random) -> Workload:
    """Make a workload of the smaller kinds."""
    return rng.choice([race, leave, keep, deliver, resolve])(rng)


PROTOCOLS = [forward, publish, reach_out]
