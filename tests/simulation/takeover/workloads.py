"""The workloads of the simulated crashes: what a seed decides, and what each client must see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from reqtable.config import Config
from reqtable.testing import Client, Faults, Peer, Report, SimulationFailed
from tests.simulation.handlers import blob
from tests.simulation.shared import Dialogue, choose_faults, choose_limits, play_dialogue
from tests.simulation.takeover.handlers import PATIENCE_S, Counting
from tests.simulation.takeover.world import World


@dataclass
class Case:
    """Describes one simulation that can be run."""

    config: Config
    faults: Faults
    deaths: list[int]
    segment_bytes: int
    crashes: int | None  # how often one step crashes; None: none does
    clients: list[tuple[float, Client]] = field(default_factory=list)
    poisoned: int = -1  # the client whose step crashes


def run(seed: int, only: Sequence[str] | None = None) -> tuple[str, Report]:
    """Simulate the crashes of a seed; `only` names the faults that may happen. Raises SimulationFailed."""
    case = case_of(seed)
    faults = case.faults if only is None else case.faults.restricted_to(only)
    world = World(seed, faults, case.config, list(case.deaths), case.segment_bytes)
    crashes: Counter[Any] = Counter()
    handler = type("Counting", (Counting,), {"network": world.network, "crashes": crashes})
    peers = [(at, Peer(world.network, number, client)) for number, (at, client) in enumerate(case.clients)]
    report = world.run(handler, peers)
    report.problems += _wrong(case, world, crashes)
    if report.problems:
        raise SimulationFailed(report)
    return name_of(case), report


def name_of(case: Case) -> str:
    """Return in a word what happens in a simulation."""
    if case.crashes is not None:
        return "poison" if case.crashes > case.config.takeover_attempts else "crash"
    return f"deaths-{len(case.deaths)}"


def case_of(seed: int) -> Case:
    rng = Random(seed)
    limits = choose_limits(rng, read_bytes_per_s_min=1, read_timeout_s=PATIENCE_S, write_timeout_s=PATIENCE_S)
    deaths = [_points_to_death(rng) for _ in range(rng.choice([1, 1, 2, 3, 6]))]
    crashes = rng.randrange(1, 4) if rng.random() < 0.2 else None
    # A drawn death may cut off any step, also that of the takeover.
    attempts = len(deaths) + (crashes or 0)
    case = Case(
        Config(limits=limits, takeover_attempts=attempts),
        replace(choose_faults(rng), delay_max_s=0.02, **({"would_block": 0.4} if rng.random() < 0.4 else {})),
        deaths,
        rng.choice([4096, 16_384, 65_536]),
        crashes,
    )
    count = rng.choice([1, 2, 3, 5])
    if crashes is not None:
        case.poisoned = rng.randrange(count)
        if rng.random() < 0.4:
            case.crashes = attempts + 1 + len(deaths)
    for number in range(count):
        client = _poisoned(rng, case) if number == case.poisoned else _client(rng)
        case.clients.append((rng.choice([0.0, rng.uniform(0, 3)]), client))
    return case


def _points_to_death(rng: Random) -> int:
    return rng.randrange(1, rng.choice([10, 60, 300, 300, 1000, 3000]))


def _dialogue(rng: Random) -> Dialogue:
    dialogue: Dialogue = []
    shown: list[bytes] = []
    count = 0

    def add(text: bytes) -> bytes:
        nonlocal count
        count += 1
        shown[:] = [*shown, text][-4:]
        return b"%d %b\n" % (count, b" ".join(shown))

    verbs = rng.choice([["add", "add", "echo", "echo", "still", "big", "parts", "nap", "wait", "take"], ["echo"]])
    for _ in range(rng.randrange(1, 10)):
        verb = rng.choice(verbs)
        if verb == "add":
            text = b"%d" % rng.randrange(100)
            dialogue.append((b"add %b\n" % text, add(text)))
        elif verb == "echo":
            text = b"e%d" % rng.randrange(10**6)
            dialogue.append((b"echo %b\n" % text, b"%b\n" % text))
        elif verb == "still":
            dialogue.append((b"still x\n", b""))
        elif verb == "big":
            size = rng.choice([10, 1000, 1000, 10_000, 20_000, 100_000])
            dialogue.append((b"big %d\n" % size, blob(size) + b"\n"))
        elif verb == "parts":
            parts = rng.randrange(1, 6)
            dialogue.append((b"parts %d\n" % parts, b"".join(b"part %d\n" % part for part in range(parts))))
        elif verb == "nap":
            dialogue.append((b"nap %d\n" % rng.randrange(30), b"sleeping\n" + add(b"awake")))
        elif verb == "wait":
            text = b"%d" % rng.randrange(100)
            dialogue += [(b"wait 6000\n", blob(150)), (b"add %b\n" % text, add(text))]
        else:
            data = rng.randbytes(rng.choice([1, 30, 3000]))
            dialogue.append((b"take %d\n%b" % (len(data), data), add(b"%d" % sum(data))))
    return dialogue


def _play(rng: Random) -> Client:
    dialogue = _dialogue(rng)
    if rng.random() < 0.5:
        return play_dialogue(rng, dialogue, 4)
    client = Client()
    for sent, answer in dialogue:
        client.send(sent).expect(answer)
    return client


def _client(rng: Random) -> Client:
    if rng.random() < 0.05:
        return Client().send(b"echo hello\n").reset()
    client = _play(rng)
    how = rng.randrange(6)
    if how == 0:
        return client.reset()
    if how == 1:
        return client.send(b"half a line").end().expect(b"partial half a line\n").expect_end()
    if how == 2:
        return client
    if how == 3:
        return client.send(b"bye\n").expect(b"bye\n").expect_end()
    if how == 4 and rng.random() < 0.5:
        return client.send(b"bye\n").expect(b"bye\n").pause(1).expect_end()
    if how == 4:
        return client.send(b"add 1\necho x\nbye\nadd 2\n").end().take_rest()
    return client.end().expect_end()


def _poisoned(rng: Random, case: Case) -> Client:
    assert case.crashes is not None
    client = _play(rng).send(b"crash %d\n" % case.crashes)
    if case.crashes > case.config.takeover_attempts:
        return client.take_rest()
    return client.expect(b"survived\n").end().expect_end()


def _wrong(case: Case, world: World, crashes: Counter[Any]) -> Iterator[str]:
    for result in world.results:
        for why, count in result.lost.items():
            if why != "that crashed too often" or case.poisoned < 0:
                yield f"{count} requests were lost {why}"
    most = case.config.takeover_attempts + 1
    for peer, count in crashes.items():
        if count > most:
            yield f"the step of {peer} crashed {count} times"
    ended = sum(result.lost["that crashed too often"] for result in world.results)
    is_poison = case.crashes is not None and case.crashes > case.config.takeover_attempts
    if ended > is_poison or (is_poison and not ended):
        yield f"{ended} requests were ended because they crash"
