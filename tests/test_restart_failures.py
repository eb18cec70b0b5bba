"""Restarts that fail: whatever goes wrong, at whatever moment, each client goes on with one of the processes."""

from __future__ import annotations

import re
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.restarted import LEDGER, ROOT, Program, ask, next_version
from tests.support import WAIT_S, Client

# What is added to the new code, and what the problem says then.
AT_START = {
    "import": ("raise RuntimeError('no luck')", "'app.py:Ledger' can't be imported: "),
    "syntax": ("def", "SyntaxError"),
    "exit": ("os._exit(3)", "exited with status 3: see its log"),
    "exit-well": ("os._exit(0)", "ended by itself"),
    "killed": ("os.kill(os.getpid(), 9)", "was killed by SIGKILL"),
    "on_start": (
        "def on_start(cls, server): raise RuntimeError('not today')\nLedger.on_start = classmethod(on_start)",
        "the new process can't start: RuntimeError: not today, raised by on_start (",
    ),
    "exit-in-on_start": ("Ledger.on_start = classmethod(lambda cls, server: os._exit(4))", "exited with status 4"),
    "stop-in-on_start": ("Ledger.on_start = classmethod(lambda cls, server: server.engine.stop())", "was told to end"),
    "handler": ("Ledger = 3", "Ledger is not a handler class"),
    "migrate": (
        "def migrate(cls, version, state, fields): raise ValueError('too old')\n"
        "Ledger.state_version, Ledger.migrate = 2, classmethod(migrate)",
        "Ledger.migrate raised ValueError('too old')",
    ),
    "no-migrate": ("Ledger.state_version = 2", "write migrate"),
    "state": ("Ledger.renamed = Ledger.asked\ndel Ledger.asked", "asked"),
}
# Patches of the new code's engine: it dies at a certain message.
TAKER = "\nfrom reqtable.handover.taker import Taker\nfrom reqtable.handover import messages\n"
DIES_AT = {
    "rehearsal": "Taker._problems = lambda *_: os._exit(5)",
    "send": "Taker._prepare = lambda *_: os._exit(5)",
}


def goes_on(program: Program, clients: list[Any]) -> None:
    """Check that the first process serves the clients that it had, and new ones, and can restart."""
    for number, client in enumerate(clients):
        assert ask(client, "add 1") == (1, program.pid, str(number + 1)), program.log
    with program.client() as newcomer:
        assert ask(newcomer, "add 5") == (1, program.pid, "5"), program.log
    assert program.there == [program.pid]


@pytest.fixture
def some(tmp_path: Path) -> Any:
    """Yield a program, and clients whose totals are 0, 1 and 2."""
    with Program(tmp_path) as program:
        clients = [program.client() for _ in range(3)]
        try:
            for number, client in enumerate(clients):
                ask(client, f"add {number}")
            yield program, clients
        finally:
            for client in clients:
                client.close()


@pytest.mark.timeout(180)
def test_new_code_that_can_not_start_changes_nothing(some: Any) -> None:
    program, clients = some
    for code, problem in AT_START.values():
        program.change(f"{next_version(LEDGER)}\n{code}\n")
        assert problem in program.refused()
        for own in clients:
            assert ask(own, "add 100")[:2] == (1, program.pid), code
        assert len(program.there) == 1, code
    program.change(next_version(LEDGER, 3))
    program.moved()
    assert ask(clients[2], "add 1") == (3, program.pids[-1], str(100 * len(AT_START) + 3))


@pytest.mark.parametrize("how", ["rehearsal", "send"])
def test_new_code_that_dies_before_the_commit_loses_nothing(some: Any, how: str) -> None:
    program, clients = some
    program.change(next_version(LEDGER) + TAKER + DIES_AT[how])
    assert "exited with status 5" in program.refused()
    goes_on(program, clients)


def test_new_code_that_dies_before_it_listens_loses_only_what_it_was_given(some: Any) -> None:
    program, clients = some
    program.change(next_version(LEDGER) + TAKER + "Taker._listen = lambda *_: os._exit(5)")
    assert "exited with status 5" in program.refused()
    assert [client.rest() for client in clients] == [b"", b"", b""]
    goes_on(program, [])


def test_new_code_that_dies_while_the_old_process_drains_is_replaced_by_it(tmp_path: Path) -> None:
    """A request that can't move keeps the old process there."""
    source = LEDGER + STUCK
    with Program(tmp_path, source) as program, program.client() as client:
        client.send(b"stick\n")
        program.wait_for("it is stuck")
        program.change(next_version(source))
        outcome = program.restart()
        assert outcome["problem"] is None
        new = program.pids[1]
        with program.client() as other:
            assert ask(other, "add 1")[:2] == (2, new)
        program.kill(new)
        program.wait_for("this process goes on, because the new process was killed by SIGKILL")
        with program.client() as other:
            assert ask(other, "add 1")[:2] == (1, program.pid)
        assert program.operator().get("/v1/stats")  # at its path, too
        (program.folder / "go").touch()
        assert client.line() == b"unstuck\n"
        assert ask(client, "add 2") == (1, program.pid, "2")


# A handler that has a call in flight until there is a file "go".
STUCK = """
import logging, time
from reqtable import call


def wait_for_go():
    logging.getLogger("app").warning("it is stuck")
    while not os.path.exists("go"):
        time.sleep(0.01)


class Ledger(Ledger):
    @state(line(limit=4096))
    def asked(self, text):
        if text.strip() == b"stick":
            return self.unstuck, call(wait_for_go)
        return super().asked(text)

    @state()
    def unstuck(self, _):
        self.send(b"unstuck\\n")
        return self.asked
"""


HANGS = {
    "import": ("import time\ntime.sleep(1000)", "has not started within 0.5 s"),
    "on_start": ("import time\nLedger.on_start = classmethod(lambda cls, server: time.sleep(1000))", "has not started"),
    "rehearsal": (f"{TAKER}import time\nTaker._problems = lambda *_: time.sleep(1000)", "has not answered Rehearse"),
    "send": (f"{TAKER}import time\nTaker._prepare = lambda *_: time.sleep(1000)", "has not answered Send"),
    "listen": (f"{TAKER}import time\nTaker._listen = lambda *_: time.sleep(1000)", "has not answered Listen"),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", HANGS)
def test_new_code_that_hangs_is_killed(tmp_path: Path, how: str) -> None:
    """The old process waits a second or so for an answer here, not ten."""
    code, problem = HANGS[how]
    source = f"{LEDGER}\nfrom reqtable.handover import giver\ngiver._ANSWER_S = 1.0\n"
    start_s = 0.5 if "started" in problem else 30
    config = f"[restart]\nstart_timeout_s = {start_s}\n"
    with Program(tmp_path, source, "unix://s.sock", config=config) as program:
        with Client(str(tmp_path / "s.sock"), socket.AF_UNIX) as client:
            ask(client, "add 1")
            program.change(f"{next_version(source)}\n{code}\n")
            if how == "listen":  # it has the request already, and goes on with it
                assert problem in program.restart()["problem"]
                program.kill(program.pids[1])
                program.wait_exit(program.pids[1])
                assert client.rest() == b""
            else:
                assert problem in program.refused()
                assert ask(client, "add 1") == (1, program.pid, "2")
        with Client(str(tmp_path / "s.sock"), socket.AF_UNIX) as other:
            assert ask(other, "add 1") == (1, program.pid, "1")


def test_a_command_that_is_not_there_changes_nothing(tmp_path: Path) -> None:
    with Program(tmp_path, config='[restart]\ncommand = ["no-such-program"]\n') as program, program.client() as client:
        ask(client, "add 1")
        for _ in range(2):
            assert program.refused() == "no-such-program can't be started: No such file or directory"
        assert ask(client, "add 1") == (1, program.pid, "2")
        assert len(program.pids) == 1


def test_descriptors_that_run_out_in_the_new_process_lose_nothing(tmp_path: Path) -> None:
    """The new process takes some batches. With the one that does not fit, it gives up."""
    limits = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))\n"
    with Program(tmp_path, config="[restart]\nslice_rows = 5\n") as program:
        clients = [program.client() for _ in range(80)]
        try:
            for number, client in enumerate(clients):
                ask(client, f"add {number}")
            program.change(limits + next_version(LEDGER))
            outcome = program.restart()
            assert "too few descriptors" in outcome["problem"]
            answers = [ask(client, "add 1") for client in clients]
            assert [each.rest for each in answers] == [str(number + 1) for number in range(80)]
            moved = [each for each in answers if each.version == 2]
            assert len(moved) == outcome["moved"] > 0
            with program.client() as other:
                assert ask(other, "add 1") == (1, program.pid, "1")
            assert "Traceback" not in program.log
        finally:
            for client in clients:
                client.close()
        program.wait_exit(program.pids[1])  # with its last request
        assert program.there == [program.pid]


def test_descriptors_that_run_out_in_the_old_process_lose_nothing(tmp_path: Path) -> None:
    with Program(tmp_path) as program, program.client() as client:
        ask(client, "add 1")
        used = len(program.descriptors(program.pid))
        resource.prlimit(program.pid, resource.RLIMIT_NOFILE, (used + 1, used + 100))
        program.kill(program.pid, signal.SIGUSR2)
        program.wait_for("this process goes on, because .*Too many open files")
        resource.prlimit(program.pid, resource.RLIMIT_NOFILE, (used + 100, used + 100))
        assert ask(client, "add 1") == (1, program.pid, "2")
        program.change(next_version(LEDGER))
        program.moved()
        assert ask(client, "add 1") == (2, program.pids[-1], "3")


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_generations_leave_nothing_behind(tmp_path: Path) -> None:
    with Program(tmp_path, LEDGER, "tcp://127.0.0.1:0", "unix://s.sock") as program, program.client() as client:
        ask(client, "add 1")
        descriptors = []
        for generation in range(2, 12):
            program.change(next_version(LEDGER, generation))
            program.moved()
            assert ask(client, "add 1") == (generation, program.pids[-1], str(generation))
            found = program.descriptors(program.pids[-1])
            descriptors.append(sorted(re.sub(r"\d+", "", each) for each in found))
        assert program.there == program.pids[-1:]
        assert descriptors[-1] == descriptors[0]
        [row] = [each for each in program.operator().get("/v1/requests") if each["state"] == "READING"]
        assert row["steps"] >= 11


# Hooks that leave a mark, and a log of their own.
MARKS = """
import logging, threading


def on_start(cls, server):
    logging.getLogger("app").warning("on_start of %d", os.getpid())


def on_stop(cls, server):
    logging.getLogger("app").warning("on_stop of %d", os.getpid())


Ledger.on_start, Ledger.on_stop = classmethod(on_start), classmethod(on_stop)
"""


def test_a_check_says_once_how_it_went_and_stops_nothing(tmp_path: Path) -> None:
    """A process that never listens calls `on_stop` of nothing: what its hook would undo, the old process needs."""
    with Program(tmp_path, LEDGER + MARKS) as program, program.client() as client:
        ask(client, "add 1")
        assert program.restart(check=True)["problem"] is None
        program.wait_exit(program.pids[1])
        program.wait_for(f"on_start of {program.pids[1]}")
        program.change("raise RuntimeError('no luck')")
        assert "RuntimeError: no luck" in program.restart(check=True)["problem"]
        command = [sys.executable, "-m", "reqtable", "restart", "--check", "--control", str(program.control)]
        said = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False, cwd=ROOT)
        assert (said.returncode, said.stdout) == (1, "")
        assert said.stderr.startswith("reqtable: a restart would fail: the new process can't start: ")
        program.change(LEDGER + MARKS)
        program.moved()
        program.wait_for(f"on_stop of {program.pid}")
        log = list(program.lines)
        assert [line for line in log if "on_stop" in line] == [
            line for line in log if f"on_stop of {program.pid}" in line
        ]
        assert sum("INFO" in line and "restart: the check has found no problem" in line for line in log) == 1
        assert sum("INFO" in line and "restart: the check has failed: the new process" in line for line in log) == 2
        assert not [line for line in log if "ERROR" in line]
        assert sum("serving Ledger on" in line for line in log) == 2  # of the first process and the last one
        assert ask(client, "add 1").rest == "2"
