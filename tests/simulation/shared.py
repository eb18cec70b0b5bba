"""What the workloads of the fuzzer share: how they choose faults and limits, make servers, and play clients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

import reqtable
from reqtable.config import Config
from reqtable.dispatch import is_resumable
from reqtable.testing import Client, Faults, Peer, Report, Upstream

ADDRESS = ("127.0.0.1", 7000)
Dialogue = list[tuple[bytes, bytes]]  # pairs of what a client sends and the answer that it must get


class Killed(KeyboardInterrupt):
    """Ends a simulated process at once. The engine lets it through, as it does a KeyboardInterrupt."""


@dataclass
class Workload:
    """Describes one simulation that can be run."""

    name: str
    server: Callable[[], Any]
    clients: list[Client]
    faults: Faults
    check: Callable[[Report], Iterator[str]]
    upstreams: list[Upstream] = field(default_factory=list)
    names: dict[str, list[str]] = field(default_factory=dict)


def choose_faults(rng: Random, **harsh: float) -> Faults:
    """Choose faults: mostly the default faults, sometimes none, many of one kind, or the `harsh` ones as well."""
    rates: dict[str, Any] = {"delayed": 0.05, "delay_max_s": 0.3}
    how = rng.randrange(6)
    if how == 0:
        return Faults.none()
    if how == 1:
        kind = rng.choice(["split", "partial", "would_block", "interrupted", "small_buffer", "spurious", "withheld"])
        rates[kind] = 0.5
    if how >= 3:
        rates |= harsh
        if rng.random() < 0.2:
            rates["stalled"] = 0.01
    return Faults(**rates)


def choose_config(rng: Random, **more: Any) -> Config:
    """Choose limits so low that they are reached all the time."""
    limits = {
        "steps_per_pass": rng.choice([1, 1, 2, 5, 64]),
        "recv_bytes": rng.choice([16, 100, 4096, 65_536]),
        "high_water_bytes": rng.choice([1, 200, 65_536]),
        "accepts_per_pass": rng.choice([1, 3, 16]),
        "entries_max": rng.choice([2, 5, 100_000]),
    }
    return Config(limits=reqtable.Limits(**limits | more))


def choose_limits(rng: Random, **more: Any) -> reqtable.Limits:
    """Choose limits for processes that follow one another: their requests must all have room."""
    return reqtable.Limits(
        steps_per_pass=rng.choice([1, 2, 64]),
        recv_bytes=rng.choice([16, 100, 65_536]),
        high_water_bytes=rng.choice([1, 200, 65_536]),
        accepts_per_pass=rng.choice([1, 3, 16]),
        **more,
    )


unclosed: list[Any] = []  # the handlers of this simulation whose on_close has not been called


class Watched:
    """Checks that a handler's steps and its `on_close` are called only when they may, and `on_close` exactly once."""

    has_closed = False

    def __init__(self, entry: Any) -> None:
        super().__init__(entry)  # type: ignore[call-arg]
        unclosed.append(self)

    def _resume(self, item: Any) -> Any:
        assert not self.has_closed, "a step after on_close"
        return super()._resume(item)  # type: ignore[misc]

    def on_close(self) -> None:
        running = self.entry.table.running  # type: ignore[attr-defined]
        assert running is None, f"on_close during a step of {running}"
        assert not self.has_closed, "on_close twice"
        self.has_closed = True
        unclosed.remove(self)
        super().on_close()  # type: ignore[misc]


class Unchecked:
    """Does not check the handler class of a server. Each simulation has a class of its own, and checks take long."""

    def _check_handler(self, handler_class: Any) -> None:
        pass


def make_server(
    rng: Random, make: Callable[[], Any], kind: Any = reqtable.TCPServer, pool: float = 0.4, **limits: Any
) -> Callable[[], Any]:
    config = choose_config(rng, **limits)
    pooled = rng.random() < pool
    sized = type("Server", (Unchecked, kind), {"request_queue_size": rng.choice([4, 100])})

    def factory() -> Any:
        handler = make()
        if not is_resumable(handler):
            return sized(ADDRESS, handler, dispatch="greenlet", config=config)
        watched = type(handler.__name__, (Watched, handler), {})
        return sized(ADDRESS, watched, dispatch="pool" if pooled else "inline", config=config)

    return factory


def play_dialogue(rng: Random, dialogue: Dialogue, patience_s: float) -> Client:
    """Make a client that has that dialogue, in random pieces and at random pace.

    The client is never silent for longer than `patience_s`.
    """
    client = Client()
    while dialogue:
        count = rng.choice([1, 1, 2, 5, len(dialogue)])
        group, dialogue = dialogue[:count], dialogue[count:]
        send_in_pieces(rng, client, b"".join(sent for sent, _ in group))
        if rng.random() < 0.2:
            if rng.random() < 0.5:
                client.read_nothing()
            client.pause(rng.uniform(0, 5))
        client.expect(b"".join(answer for _, answer in group))
        if rng.random() < 0.2:
            client.pause(rng.uniform(0, patience_s))
    return client


def send_in_pieces(rng: Random, client: Client, data: bytes) -> None:
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.choice([0, 0, 1, 3])))
    for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
        if end > begin:
            client.send(data[begin:end])
            if rng.random() < 0.2:
                client.pause(rng.uniform(0, 0.5))


def silent(timeout_s: float) -> Callable[[Peer], Any]:
    """Make a step that sends nothing more: the server must end the connection after its timeout, and not before."""

    def play(peer: Peer) -> Any:
        begun = peer.network.clock.now
        yield lambda: bool(peer.ended or peer.unexpected), timeout_s + 5
        passed = peer.network.clock.now - begun
        assert not peer.unexpected, f"{peer} sent nothing, and yet received {peer.unexpected!r}"
        if peer.ended != "reset":  # a fault
            assert peer.ended == "end", f"{peer} sent nothing for {passed:.0f} s, and is still connected"
            assert passed > timeout_s - 2, f"{peer} was cut off after {passed:.1f} s instead of {timeout_s} s"

    return play


def trickling(timeout_s: float) -> Callable[[Peer], Any]:
    """Make a step that sends a byte now and then, but never a whole item: this must not keep the connection open."""

    def play(peer: Peer) -> Any:
        begun = peer.network.clock.now
        while not peer.ended and peer.network.clock.now < begun + timeout_s + 10:
            yield from peer.send(b"x")
            yield lambda: bool(peer.ended), 7
        assert peer.ended, f"{peer} dribbled for {peer.network.clock.now - begun:.0f} s, and is still connected"

    return play


def take_bye(peer: Peer) -> Any:
    while (yield from peer.receive()) is not None:
        pass


def finish(
    rng: Random,
    client: Client,
    question: bytes,
    bye: bytes = b"",
    silence_s: float | None = None,
    dribbling_s: float | None = None,
) -> Client:
    """Choose how a dialogue ends: by closing, a reset, silence, dribbling, `bye` or an end of file.

    `question` is any command that has an answer. `bye` is the command that ends the connection, if there is one. The
    server must end a silent connection after `silence_s`, and a dribbling connection after `dribbling_s`; None: it need
    not.
    """
    how = rng.randrange(8)
    if how == 0:
        return client  # closes at once
    if how == 1:
        return client.reset()
    if how == 7:
        # the reset follows the questions at once, so the answers run into it
        return client.send(question * rng.randrange(1, 4) + bye).reset()
    if how == 2 and silence_s is not None:
        return client.then(silent(silence_s))
    if how == 6 and dribbling_s is not None:
        return client.then(trickling(dribbling_s))
    if how == 3 and bye:
        # The server never reads what follows the last command, which must not cut off the last answers. But a blocking
        # handler's connection is closed by the server's hooks, as in socketserver, so unread input would reset it.
        unread = bytes(rng.randrange(60)) if dribbling_s is not None else b""
        return client.send(bye + unread).then(take_bye).expect_end()
    return client.end().expect_end()


def nothing_more(report: Report) -> Iterator[str]:
    return iter(())


HARSH = {"reset": 0.01, "aborted": 0.05}
