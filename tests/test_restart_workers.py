"""Hot restarts of a supervisor, with real processes: the workers of the next one go on with the requests."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.restarted import LEDGER, ROOT, SESSION, Program, answer_of, ask, next_version
from tests.service import children_of, state_of
from tests.support import WAIT_S, Client
from tests.test_notify import Systemd

READY = r"(\d+) of \1 workers are ready"


class Workers(Program):
    """A program with workers. Its generations are supervisors, or processes that serve by themselves."""

    def __init__(self, folder: Path, workers: int | None = 2, source: str = LEDGER, **options: Any) -> None:
        self.restarts = 0
        self.more = options.pop("config", "")
        super().__init__(folder, source, config=self._with(workers), **options)
        self.wanted = workers

    def _with(self, workers: int | None) -> str:
        return (f"workers = {workers}\n" if workers else "") + self.more

    def next(self, workers: int | None = 2, source: str | None = None) -> None:
        """Set how many workers the next generation has, and what code."""
        self.configure(self._with(workers))
        if source is not None:
            self.change(source)

    def begin(self, pid: int | None = None) -> int:
        """Ask a process to restart. Returns the next one, once it has begun."""
        self.restarts += 1
        os.kill(pid or self.there[-1], signal.SIGUSR2)
        return int(self.wait_for(r"restart: process (\d+) begins", self.restarts)[-1][1])

    def works(self, workers: int | None = 2, source: str | None = None) -> int:
        """Restart, which must work, and wait until the process before has exited. Returns how many have moved."""
        old = self.there[-1]
        self.next(workers, source)
        new = self.begin(old)
        moved = int(self.wait_for(rf"restart: (\d+) requests? moved to process {new}")[0][1])
        self.wait_exit(old)
        return moved

    def fails(self, pattern: str, workers: int | None = 2, source: str | None = None) -> None:
        """Restart, which must fail for that reason, and wait until the new process has exited."""
        self.next(workers, source)
        self.is_gone(self.begin(), pattern)

    def is_gone(self, pid: int, pattern: str) -> None:
        """Wait until a restart has failed for that reason, and its process has gone."""
        self.wait_for(f"restart: this process goes on, because .*{pattern}")
        self.wait_exit(pid)

    def processes(self) -> set[int]:
        """Return all processes of the program that run."""
        found = set()
        for each in Path("/proc").iterdir():
            if each.name.isdecimal():
                with contextlib.suppress(OSError):
                    state, _, group = (each / "stat").read_text().rpartition(")")[2].split()[:3]
                    if int(group) == self.pid and state not in "ZX":
                        found.add(int(each.name))
        return found

    def settles(self, pid: int, workers: int = 2) -> None:
        """Wait until this process and so many workers of it are left, and nothing else."""

        def is_settled() -> bool:
            found = self.processes()
            own = set(children_of(pid)).difference(self.pids)  # a successor is a child, too
            return pid in found and len(found) == 1 + workers and found - {pid} <= own

        until(is_settled, lambda: f"{pid} of {self.processes()} is to be left:\n{self.log}")

    @property
    def workers(self) -> list[int]:
        """The processes that serve."""
        last = self.there[-1]
        found = [pid for pid in children_of(last) if state_of(pid) not in "ZX" and pid not in self.pids]
        return found or [last]


def until(condition: Callable[[], bool], account: Callable[[], str] = str) -> None:
    """Poll until the condition holds. Only for effects in other processes, which no event reports."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, account()
        time.sleep(0.01)


class Crowd:
    """Clients of a Ledger. Each remembers its total."""

    def __init__(self, program: Workers, count: int = 12) -> None:
        self.program = program
        self.clients: list[Client] = []
        self.totals: list[int] = []
        self.served_by: list[int] = []  # the process that has answered each
        for _ in range(count):
            self.join()

    def join(self) -> None:
        self.clients.append(self.program.client())
        self.totals.append(0)

    def ask(self, version: int = 1) -> set[int]:
        """Have each add something; the answers must be right, by code of that version. Returns who has answered."""
        self.served_by = []
        for number, client in enumerate(self.clients):
            self.totals[number] += number + 1
            found = client.ask(f"add {number + 1}\n".encode())
            assert found, f"request {number} has ended:\n{self.program.log}"
            answer = answer_of(found)
            assert (answer.version, answer.rest) == (version, str(self.totals[number])), self.program.log
            self.served_by.append(answer.pid)
        return set(self.served_by)

    def spread(self) -> None:
        """Have more clients join, until each worker has one."""
        while set(self.served_by) != set(self.program.workers):
            assert len(self.clients) < 200, "one worker takes all clients"
            self.join()
            self.ask()

    def left(self) -> int:
        """Ask as `ask` does, of any version. Returns how many requests have ended: the others must answer right."""
        ended = 0
        for number, client in enumerate(self.clients):
            try:
                found = client.ask(b"add 1\n")
            except OSError:
                found = b""
            if found:
                self.totals[number] += 1
                assert answer_of(found).rest == str(self.totals[number]), self.program.log
            else:
                ended += 1
        return ended

    def close(self) -> None:
        for each in self.clients:
            each.close()


@contextlib.contextmanager
def crowded(program: Workers, count: int = 12) -> Iterator[Crowd]:
    """Run the program, and have clients ask it, half of each one's next question sent already."""
    with program:
        if program.wanted:
            program.wait_for(READY)
        crowd = Crowd(program, count)
        try:
            crowd.ask()
            yield crowd
        finally:
            crowd.close()


# -- what works -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(2, 2), (None, 2), (2, None), (3, 2), (1, 3), (None, 1), (1, None)])
def test_the_next_workers_go_on(tmp_path: Path, before: int | None, after: int | None) -> None:
    program = Workers(tmp_path, before)
    with crowded(program) as crowd:
        olds = crowd.ask()
        for client in crowd.clients:
            client.send(b"add ")  # the rest of the line comes to the next worker
        assert program.works(after, next_version(LEDGER)) == 12, program.log
        for number, client in enumerate(crowd.clients):
            crowd.totals[number] += 100
            client.send(b"100\n")
        for client, total in zip(crowd.clients, crowd.totals, strict=True):
            assert client.line().split()[::2] == [b"2", str(total).encode()]
        news = crowd.ask(version=2)
        assert not olds & news
        assert news <= set(program.workers)
        assert len(program.workers) == (after or 1)
        assert len(program.there) == 1
        crowd.join()
        assert crowd.ask(version=2) <= set(program.workers)


# -- processes that are killed ----------------------------------------------------------------------------------------

# What the code has beside a Ledger: at some place, a process notes its number, and waits until it may go on.
HELD = (
    LEDGER.replace("sleep, state\n", "sleep, state, call\n").replace(
        """        elif verb == "env":""",
        """        elif verb == "call":
            return self.awake, call(hold, "call")
        elif verb == "env":""",
    )
    + """

def hold(place):
    import time
    with open(place, "a") as file:
        file.write(f"{os.getpid()}\\n")
    while not os.path.exists("free"):
        time.sleep(0.01)
"""
)
PLACES = {
    "starting": "Ledger.on_start = classmethod(lambda cls, server: hold('starting'))",
    "rehearsing": "before(Taker, '_problems', 'rehearsing')",
    "prepared": "after(Taker, '_prepare', 'prepared')",
    "listening": "before(Taker, '_listen', 'listening')",
    "draining": "",
}
WRAP = """
from reqtable.handover.taker import Taker

def before(owner, name, place):
    own = getattr(owner, name)
    setattr(owner, name, lambda *args: (hold(place), own(*args))[1])

def after(owner, name, place):
    own = getattr(owner, name)
    setattr(owner, name, lambda *args: (own(*args), hold(place))[0])
"""
BOUNDED = "[limits]\ndrain_timeout_s = 4.0\n"


def reached(program: Workers, place: str) -> int:
    """Wait until a process has come to that place. Returns its number."""
    file = program.folder / place
    until(lambda: file.exists() and "\n" in file.read_text(), lambda: f"nothing came to {place}:\n{program.log}")
    return int(file.read_text().split()[0])


def workers_of(program: Workers) -> list[dict[str, Any]]:
    """Return the workers that the process at the control socket has; none if nobody is there at this moment."""
    try:
        found: list[dict[str, Any]] = program.operator().get("/v1/workers")
    except OSError:
        return []
    return found


def free(program: Workers) -> None:
    (program.folder / "free").touch()


# Which generation goes on, and how many of the 12 requests may have ended: "some" are those of the first worker.
KILLED = {
    ("new worker", "starting"): ("old", "none"),
    ("new worker", "rehearsing"): ("old", "none"),
    ("new worker", "prepared"): ("old", "none"),
    ("new worker", "listening"): ("old", "some"),
    ("new worker", "draining"): ("new", "some"),
    ("new supervisor", "starting"): ("old", "none"),
    ("new supervisor", "rehearsing"): ("old", "none"),
    ("new supervisor", "prepared"): ("old", "none"),
    ("new supervisor", "listening"): ("old", "some"),
    ("new supervisor", "draining"): ("old", "all"),
    ("old worker", "starting"): ("old", "some"),
    ("old worker", "rehearsing"): ("old", "some"),
    ("old worker", "prepared"): ("new", "none"),
    ("old worker", "listening"): ("new", "none"),
    ("old worker", "draining"): ("new", "none"),
    ("old supervisor", "starting"): ("new", "all"),
    ("old supervisor", "rehearsing"): ("new", "all"),
    ("old supervisor", "prepared"): ("new", "none"),
    ("old supervisor", "listening"): ("new", "none"),
    ("old supervisor", "draining"): ("new", "none"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "place"), KILLED)
def test_whatever_is_killed_one_generation_goes_on(tmp_path: Path, victim: str, place: str) -> None:
    survivor, may_end = KILLED[victim, place]
    program = Workers(tmp_path, 2, HELD, config=BOUNDED)
    with crowded(program) as crowd:
        old, olds = program.pid, program.workers
        with program.client() as caller:
            if place == "draining":
                caller.send(b"call\n")  # it can't move
                reached(program, "call")
            program.next(2, next_version(HELD) + WRAP + PLACES[place])
            new = program.begin()
            if place == "draining":
                program.wait_for(r"restart: 12 requests moved")
                taker, giver = children_of(new)[0], reached(program, "call")
            else:
                taker, giver = reached(program, place), olds[0]
            victims = {"new worker": taker, "new supervisor": new, "old worker": giver, "old supervisor": old}
            os.kill(victims[victim], signal.SIGKILL)
            until(lambda: state_of(victims[victim]) in "ZX")
            free(program)
        program.settles(old if survivor == "old" else new)
        with program.client() as newcomer:
            assert ask(newcomer, "add 5")[::2] == (1 if survivor == "old" else 2, "5")
        until(lambda: {each["worker"] for each in workers_of(program)} == set(program.workers))
        most = {"some": crowd.served_by.count(olds[0]), "all": 12, "none": 0}[may_end]
        assert crowd.left() <= most, program.log
        program.works(2, next_version(LEDGER, 3))
        with program.client() as newcomer:
            assert ask(newcomer, "add 5")[::2] == (3, "5")


# -- new code that is no good -----------------------------------------------------------------------------------------

# What is added to the new code, how many workers it wants, and why the restart has failed then.
NO_GOOD = {
    "import": ("raise RuntimeError('no luck')", 2, "the new process can't start: .*RuntimeError: no luck"),
    "no workers at all": ("os._exit(3)", None, "exited with status 3"),
    "on_start of a worker": (
        "def on_start(cls, server): raise RuntimeError('not today')\nLedger.on_start = classmethod(on_start)",
        2,
        r"worker \d+ exited with status 1",
    ),
    "one worker": (
        "import reqtable.run.worker_moves as own\n"
        "own.WorkerMoves.take = lambda *_: os._exit(4) if os.path.exists('second') else open('second', 'w').close()",
        2,
        r"worker \d+ exited with status 4",
    ),
    "migrate": (
        "def migrate(cls, version, state, fields):\n    if fields['total'] == 8: raise ValueError('eight')\n"
        "    return state, fields\nLedger.state_version, Ledger.migrate = 2, classmethod(migrate)",
        2,
        "ValueError.'eight'",
    ),
    "migrate in one process": ("Ledger.state_version = 2", None, "write migrate"),
    "format": ("from reqtable.handover import messages\nmessages.FORMAT = 9", 2, "does not know format 1"),
    "too few pairs": (
        "from reqtable.run.inherited import Inherited\nown = Inherited.__init__\n"
        "def few(self, pair):\n    own(self, pair)\n    self.givers = 1\nInherited.__init__ = few",
        2,
        "sent Ready with 1 descriptors",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", NO_GOOD)
def test_new_code_that_is_no_good_changes_nothing(tmp_path: Path, how: str) -> None:
    code, workers, problem = NO_GOOD[how]
    program = Workers(tmp_path, 2)
    with crowded(program) as crowd:
        served_by = crowd.ask()
        open_at_first = opened_by(program)
        program.fails(problem, workers, f"{next_version(LEDGER)}\n{code}\n")
        assert crowd.ask() == served_by
        program.settles(program.pid)
        until(lambda: opened_by(program) == open_at_first)
        assert program.works(2, next_version(LEDGER, 3)) == 12
        crowd.ask(version=3)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ("nonsense = 1\n", "the new process can't start: .*nonsense"),
        ('[restart]\ncommand = ["/no/such"]\n', "can't be started"),
    ],
)
def test_a_configuration_that_is_no_good_changes_nothing(tmp_path: Path, config: str, problem: str) -> None:
    command_fails = "command" in config
    program = Workers(tmp_path, 2, config=config if command_fails else "")
    with crowded(program) as crowd:
        if command_fails:
            os.kill(program.pid, signal.SIGUSR2)
            program.wait_for(f"this process goes on, because .*{problem}")
        else:
            program.more = config
            program.fails(problem)
        crowd.ask()
        program.settles(program.pid)


def test_a_new_worker_that_hangs_as_it_starts_is_given_up(tmp_path: Path) -> None:
    program = Workers(tmp_path, 2, HELD, config="[restart]\nstart_timeout_s = 8.0\n")
    with crowded(program) as crowd:
        program.fails("has not started within 8 s", 2, next_version(HELD) + WRAP + PLACES["starting"])
        crowd.ask()
        program.settles(program.pid)  # the workers that hang are gone, too
        assert program.works(2, next_version(LEDGER, 3)) == 12


# -- what does not move -----------------------------------------------------------------------------------------------


def test_a_check_moves_nothing(tmp_path: Path) -> None:
    program = Workers(tmp_path, 2)
    with crowded(program) as crowd:
        served_by = crowd.ask()
        open_at_first = opened_by(program)
        for count in (1, 2):
            program.change(next_version(LEDGER))
            outcome = program.restart(check=True)
            assert (outcome["problem"], outcome["phase"], outcome["moved"], outcome["left"]) == (None, "checked", 0, 12)
            program.wait_for(r"restart: process (\d+) begins", count)
            program.wait_exit(program.pids[-1])
            program.settles(program.pid)
        assert crowd.ask() == served_by
        os.kill(program.pid, signal.SIGTTIN)  # another worker comes, so nothing stays under way
        program.settles(program.pid, 3)
        os.kill(program.pid, signal.SIGTTOU)
        program.settles(program.pid)
        until(lambda: opened_by(program) == open_at_first)
        crowd.ask()


def test_what_can_not_move_ends_in_the_old_workers_while_the_new_ones_serve(tmp_path: Path) -> None:
    program = Workers(tmp_path, 2, HELD)
    with crowded(program, 4) as crowd, program.client() as caller:
        caller.send(b"call\n")
        giver = reached(program, "call")
        program.next(2, next_version(LEDGER))
        new = program.begin()
        program.wait_for("restart: 4 requests moved")
        assert crowd.ask(version=2) <= set(children_of(new))
        with program.client() as newcomer:
            assert ask(newcomer, "add 5")[::2] == (2, "5")
        assert program.is_there(program.pid)
        free(program)
        assert answer_of(caller.line())[:2] == (1, giver)
        program.wait_exit(program.pid)  # it has moved then, for the old worker exits
        assert ask(caller, "add 5")[::2] == (2, "5")
        program.settles(new)


def test_requests_that_can_not_move_refuse_the_restart_if_that_is_wished(tmp_path: Path) -> None:
    program = Workers(tmp_path, 2, HELD, config='[restart]\nunmovable = "refuse"\n')
    with crowded(program, 4) as crowd, program.client() as caller:
        caller.send(b"call\n")
        reached(program, "call")
        program.fails("some requests can't move: 1 because .* call", 2, next_version(LEDGER))
        crowd.ask()
        free(program)
        assert answer_of(caller.line()).version == 1
        assert program.works() == 5
        crowd.ask(version=2)


def test_a_stuck_worker_does_not_hold_up_the_restart(tmp_path: Path) -> None:
    stuck = HELD.replace('return self.awake, call(hold, "call")', 'hold("call")')
    program = Workers(tmp_path, 2, stuck, config="[restart]\nstart_timeout_s = 8.0\n")
    with crowded(program, 4) as crowd, program.client() as caller:
        caller.send(b"call\n")
        pid = reached(program, "call")
        program.fails(f"worker {pid} has been stuck for 8 s", 2, next_version(LEDGER))
        free(program)
        assert answer_of(caller.line())[:2] == (1, pid)
        crowd.ask()
        assert program.works() == 5
        crowd.ask(version=2)


# -- other events meanwhile -------------------------------------------------------------------------------------------


def test_new_clients_are_served_all_the_while(tmp_path: Path) -> None:
    program = Workers(tmp_path, 2)
    problems: list[str] = []
    counts = [0] * 4
    is_over = threading.Event()

    def come_and_go(place: int) -> None:
        while not is_over.is_set():
            try:
                with program.client() as client:
                    if [ask(client, "add 1").rest, ask(client, "add 2").rest] != ["1", "3"]:
                        problems.append("a wrong answer")
            except (OSError, ValueError) as error:
                problems.append(f"{type(error).__name__}: {error}")
            counts[place] += 1

    with crowded(program) as crowd:
        threads = [threading.Thread(target=come_and_go, args=(place,)) for place in range(4)]
        for thread in threads:
            thread.start()
        try:
            for version, workers in enumerate((2, 3, None, 2), 2):
                at_first = list(counts)
                program.works(workers, next_version(LEDGER, version))
                crowd.ask(version)
                until(lambda before=at_first: all(n > was for n, was in zip(counts, before, strict=True)))
        finally:
            is_over.set()
            for thread in threads:
                thread.join(WAIT_S)
    assert problems == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("place", ["starting", "rehearsing", "prepared", "draining"])
def test_a_signal_to_end_ends_the_program(tmp_path: Path, number: int, place: str) -> None:
    program = Workers(tmp_path, 2, HELD, config=BOUNDED)
    with crowded(program), program.client() as caller:
        caller.send(b"call\n")
        reached(program, "call")
        program.next(2, next_version(HELD) + WRAP + PLACES[place])
        new = program.begin()
        if place == "draining":
            program.wait_for("requests? moved")
        else:
            reached(program, place)
        os.kill(program.pid, number)
        if number == signal.SIGTERM:
            free(program)
        program.wait_exit(program.pid)
        free(program)
        if place == "draining":
            program.settles(new)  # it had taken the place already
        else:
            program.wait_exit(new)
            until(lambda: not program.processes())
            assert "goes on" not in program.log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "effect", "workers"), [(signal.SIGHUP, "so no worker is replaced", 2), (signal.SIGTTIN, "3 of 3", 3)]
)
def test_a_reload_and_another_worker_wait_for_the_end_of_the_restart(
    tmp_path: Path, number: int, effect: str, workers: int
) -> None:
    program = Workers(tmp_path, 2, HELD)
    with crowded(program) as crowd:
        program.next(2, next_version(HELD) + WRAP + PLACES["rehearsing"])
        new = program.begin()
        reached(program, "rehearsing")
        processes = program.processes()
        os.kill(program.pid, number)
        os.kill(program.pid, signal.SIGUSR2)
        program.wait_for("SIGUSR2: a restart is under way")
        assert program.processes() == processes
        os.kill(new, signal.SIGKILL)
        program.wait_exit(new)
        free(program)
        program.wait_for(effect)
        program.settles(program.pid, workers)
        crowd.ask()
        assert program.works(2, next_version(LEDGER)) == 12


def test_workers_that_drain_do_not_hold_up_a_restart(tmp_path: Path) -> None:
    program = Workers(tmp_path, 2, HELD)
    with crowded(program, 0), program.client() as caller:
        caller.send(b"call\n")
        former = reached(program, "call")
        program.more = "[limits]\nentries_max = 77\n"
        program.next(2)
        os.kill(program.pid, signal.SIGHUP)
        os.kill(program.pid, signal.SIGUSR2)
        program.wait_for("SIGUSR2: some workers are still starting: try again")
        program.wait_for("ending when 1 request is done")
        program.settles(program.pid, 3)  # the other former one has gone
        program.wait_for("2 of 2 workers are ready", 2)
        program.next(2, next_version(LEDGER))
        with program.client() as client:
            assert ask(client, "add 1")[::2] == (1, "1")
            new = program.begin()
            program.wait_for("restart: 1 request moved")
            assert ask(client, "add 1")[::2] == (2, "2")
        free(program)
        assert answer_of(caller.line())[:2] == (1, former)
        program.settles(new)


@pytest.mark.slow
def test_restarts_of_restarts_leave_nothing_behind(tmp_path: Path) -> None:
    program = Workers(tmp_path, 2)
    with crowded(program, 6) as crowd:
        first = sum(opened_by(program))
        ids: set[int] = set()
        for version in range(2, 12):
            crowd.join()
            assert ids <= ids_of(program)
            ids = ids_of(program)
            assert len(ids) == len(crowd.clients)
            assert program.works(2, next_version(LEDGER, version)) == len(crowd.clients)
            program.settles(program.there[-1])
            crowd.ask(version)
            until(lambda: program.operator().get("/v1/stats")["entries"] == len(crowd.clients))
            more = version - 1  # a connection for each newcomer
            until(lambda more=more: sum(opened_by(program)) <= first + more, lambda: f"{opened_by(program)}, {first}")


def opened_by(program: Workers) -> list[int]:
    """Return how many descriptors the supervisor and each of its workers have."""
    return [len(os.listdir(f"/proc/{pid}/fd")) for pid in (program.there[-1], *program.workers)]


def ids_of(program: Workers) -> set[int]:
    return {row["id"] for row in program.operator().get("/v1/requests")}


@pytest.mark.slow
def test_failed_restarts_leave_nothing_behind(tmp_path: Path) -> None:
    program = Workers(tmp_path, 2)
    bad = f"{next_version(LEDGER)}\nLedger.state_version = 2\n"
    with crowded(program, 6) as crowd:
        first = opened_by(program)
        for _ in range(5):
            program.next(2, bad)
            new = program.begin()
            program.wait_for("restart: this process goes on, because .*write migrate", program.restarts)
            program.wait_exit(new)
            program.settles(program.pid)
            until(lambda: opened_by(program) == first, lambda: f"{opened_by(program)}, not {first}")
        crowd.ask()
        assert program.works(2, next_version(LEDGER, 3)) == 6
        crowd.ask(version=3)


# -- beside the requests ----------------------------------------------------------------------------------------------

EVERYWHERE = (
    SESSION
    + """

def on_engine(engine):
    os.write(1, f"engine of {os.getpid()}, version {VERSION}\\n".encode())  # in one piece: the workers share the pipe


if __name__ == "__main__":
    import logging

    logging.basicConfig(level=logging.DEBUG)
    logging.getLogger("reqtable.access").setLevel(logging.INFO)
    reqtable.serve(
        {"tcp://127.0.0.1:0": Ledger, "unix://s.sock?mode=640": Ledger, "udp://127.0.0.1:0": Session},
        on_engine=on_engine,
    )
"""
)


def test_all_transports_move_and_each_engine_is_told(tmp_path: Path) -> None:
    served = {"command": [sys.executable, "app.py"], "environment": {"REQTABLE_CONFIG": "reqtable.toml"}}
    program = Workers(tmp_path, 2, LEDGER + EVERYWHERE, **served)
    path = tmp_path / "s.sock"
    with crowded(program, 2) as crowd, contextlib.ExitStack() as stack:
        unix = stack.enter_context(Client(str(path), socket.AF_UNIX))
        udp = stack.enter_context(contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)))
        udp.settimeout(WAIT_S)
        udp.connect(program.place("udp"))

        def talk(version: int) -> None:
            crowd.ask(version)
            assert ask(unix, "add 1")[::2] == (version, str(version))
            udp.send(b"hello")
            assert udp.recv(100).split()[0] == str(version).encode()  # whichever worker reads it

        talk(1)
        before = os.stat(path)
        program.fails("exited with status 1", 2, "raise RuntimeError")
        for version in (2, 3):
            assert program.works(2, next_version(LEDGER + EVERYWHERE, version)) in (4, 5)  # each worker has a session
            talk(version)
            with Client(str(path), socket.AF_UNIX) as newcomer:
                assert ask(newcomer, "add 1")[::2] == (version, "1")
            assert os.stat(path).st_ino == before.st_ino
            told = {int(each[1]) for each in program.wait_for(rf"engine of (\d+), version {version}", 2)}
            assert told == set(program.workers)
        crowd.close()
        ended = program.wait_for("reqtable.access:.* Ledger done in", 4)  # two of the crowd, and two newcomers
        assert len(ended) == 4  # what moves has not ended
        assert not [line for line in program.lines if "reqtable.access" in line and "done" not in line]
        last = program.there[-1]
        os.kill(last, signal.SIGTERM)
        program.wait_exit(last)
        assert not path.exists()


def test_a_worker_that_can_not_move_after_others_have_drains(tmp_path: Path) -> None:
    second = "own = Taker._prepare\ndef second(*args):\n    if os.path.exists('first'): hold('prepared')\n"
    second += "    open('first', 'w').close()\n    return own(*args)\nTaker._prepare = second\n"
    program = Workers(tmp_path, 2, HELD, config=BOUNDED)
    with crowded(program) as crowd:
        crowd.spread()
        stays = crowd.served_by.count(program.workers[1])
        program.next(2, next_version(HELD) + WRAP + second)
        new = program.begin()
        os.kill(reached(program, "prepared"), signal.SIGKILL)
        program.wait_for(r"worker \d+ could not move its requests, so it drains")
        free(program)
        program.wait_exit(program.pid)
        program.settles(new)
        assert crowd.left() == stays  # idle ones see end of file, as in any drain
        assert program.works(2, next_version(LEDGER, 3)) == len(crowd.clients) - stays


def test_an_old_worker_that_gets_stuck_as_it_drains_is_killed(tmp_path: Path) -> None:
    stuck = HELD.replace(
        '"env":', '"sit":\n            return self.sitting, call(hold, "call")\n        elif verb == "env":'
    )
    stuck = stuck.replace(
        "    def say(self", "    @state()\n    def sitting(self, _):\n        hold('never')\n\n    def say(self"
    )
    stuck = stuck.replace('"free"', '"free" if place == "call" else "not yet"')
    program = Workers(tmp_path, 2, stuck, config="[limits]\ndrain_timeout_s = 1.0\n")
    with crowded(program, 2) as crowd, program.client() as caller:
        caller.send(b"sit\n")
        pid = reached(program, "call")
        program.next(2, next_version(LEDGER))
        new = program.begin()
        program.wait_for("restart: 2 requests moved")
        free(program)
        assert reached(program, "never") == pid
        program.wait_for(f"worker {pid} has not ended in time: killed")
        program.wait_exit(program.pid)
        program.settles(new)
        crowd.ask(version=2)


def test_operators_are_answered_by_the_supervisor_that_serves(tmp_path: Path) -> None:
    program = Workers(tmp_path, 2)
    with crowded(program) as crowd:
        program.next(3, next_version(LEDGER))
        command = [sys.executable, "-m", "reqtable", "restart", "--control", str(program.control)]
        said = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False, cwd=ROOT)
        assert said.returncode == 0, said
        assert re.match(rf"12 requests moved to process {program.there[-1]} in ", said.stdout)
        workers = program.operator().get("/v1/workers")
        assert {each["worker"] for each in workers} == set(children_of(program.there[-1]))
        assert sum(each["entries"] for each in workers) == 12
        crowd.ask(version=2)
        program.change("raise RuntimeError")
        said = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False, cwd=ROOT)
        assert said.returncode == 1
        assert "not restarted, the old process goes on: the new process can't start: " in said.stderr
        program.change(next_version(LEDGER, 3))
        assert program.restart(check=True)["problem"] is None  # at once: the process that failed has gone


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, None), (None, 2)])
def test_systemd_is_told_of_the_process_that_serves(tmp_path: Path, before: int | None, after: int | None) -> None:
    systemd = Systemd(f"{tmp_path}/notify")
    program = Workers(tmp_path, before, environment={"NOTIFY_SOCKET": f"{tmp_path}/notify"})
    with contextlib.closing(systemd.socket), crowded(program):
        systemd.wait_for("READY")
        program.fails("can't start", after, "raise RuntimeError")
        assert "RELOADING" in systemd.told()
        assert systemd.told()["STATUS"].startswith("serving; the restart failed: the new process can't start: ")
        program.works(after, next_version(LEDGER))
        told = [systemd.told()]
        while "MAINPID" not in told[-1]:
            told.append(systemd.told())
        assert "RELOADING" in told[0]
        assert told[-1] == {"MAINPID": str(program.there[-1]), "READY": "1", "STATUS": "serving"}
        later = [each for each in told[1:-1] if "STATUS" not in each or "workers are ready" not in each["STATUS"]]
        assert later == []
        os.kill(program.there[-1], signal.SIGTERM)
        assert systemd.wait_for("STOPPING")["STOPPING"] == "1"


def test_what_has_moved_before_a_restart_fails_goes_on_in_the_new_process(tmp_path: Path) -> None:
    third = "count = []\nown = Taker._prepare\ndef third(*args):\n    count.append(1)\n"
    third += "    if len(count) == 3: raise RuntimeError('the third')\n    return own(*args)\nTaker._prepare = third\n"
    program = Workers(tmp_path, 1, HELD, config="[restart]\nslice_rows = 1\n")
    with crowded(program, 5) as crowd:
        program.next(1, next_version(HELD) + WRAP + third)
        new = program.begin()
        program.wait_for("this process goes on, because RuntimeError: the third")
        answers = [ask(client, "add 0") for client in crowd.clients]
        assert [each.rest for each in answers] == [str(total) for total in crowd.totals]
        assert sorted(each.version for each in answers) == [1, 1, 1, 2, 2]
        with program.client() as newcomer:
            assert ask(newcomer, "add 5")[::2] == (1, "5")
        assert program.is_there(new)
        for client, answer in zip(crowd.clients, answers, strict=True):
            if answer.version == 2:
                client.close()
        program.wait_exit(new)  # with the last request that has moved
        program.settles(program.pid, 1)
        assert program.works(1, next_version(LEDGER, 3)) == 3
