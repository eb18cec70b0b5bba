"""What happens to the old process during a restart: it is killed, or told to end, or asked for another restart."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest

from tests.restarted import LEDGER, Program, ask, next_version
from tests.support import Client

# The old process does this at a phase of the restart, or before it commits.
AT = """
import signal
from reqtable.handover import batch, giver

old_enter, old_late = giver.Giver._enter, batch.Batch.late


def at(phase):
    if phase == "PHASE" and VERSION == 1:
        print("at PHASE", flush=True)
        DO


def enter(self, phase):
    old_enter(self, phase)
    at(phase.value)


def late(self):
    at("committing")
    return old_late(self)


giver.Giver._enter, batch.Batch.late = enter, late
"""
KILLS = "os.kill(os.getpid(), signal.SIGKILL)"


def at(phase: str, do: str) -> str:
    return LEDGER + AT.replace("PHASE", phase).replace("DO", do)


@pytest.mark.parametrize("phase", ["rehearsing", "rehearsed", "moving", "committing", "listening", "draining"])
def test_the_new_process_goes_on_if_the_old_one_is_killed(tmp_path: Path, phase: str) -> None:
    source = at(phase, KILLS)
    path = str(tmp_path / "s.sock")
    with Program(tmp_path, source, "tcp://127.0.0.1:0", "unix://s.sock") as program, program.client() as client:
        ask(client, "add 1")
        program.change(next_version(source))
        program.kill(program.pid, signal.SIGUSR2)
        program.wait_for("restart: process")
        program.wait_exit(program.pid)
        program.wait_for("control: listening on", 2)
        new = program.pids[1]
        for place, family in ((program.place(), socket.AF_INET), (path, socket.AF_UNIX)):
            with Client(place, family) as other:
                assert ask(other, "add 1") == (2, new, "1")
        if phase in ("committing", "listening", "draining"):
            assert ask(client, "add 1") == (2, new, "2")  # what was sent is not lost
        else:
            assert client.rest() == b""
        program.change(next_version(source, 3))
        program.moved()
        with program.client() as other:
            assert ask(other, "add 1") == (3, program.pids[2], "1")


def test_the_new_process_begins_without_the_old_one_if_that_dies_at_once(tmp_path: Path) -> None:
    """It offers nothing any more, but its places are free."""
    with Program(tmp_path, LEDGER, "unix://s.sock") as program:
        kills = f"import os, time\nos.kill({program.pid}, 9)\nwhile os.getppid() == {program.pid}: time.sleep(0.01)\n"
        program.change(kills + next_version(LEDGER))
        program.kill(program.pid, signal.SIGUSR2)
        program.wait_exit(program.pid)
        program.wait_for("this one begins without it")
        program.wait_for("control: listening on", 2)
        with Client(str(tmp_path / "s.sock"), socket.AF_UNIX) as client:
            assert ask(client, "add 1") == (2, program.pids[1], "1")


# The new process does not accept before the old one has ended the restart.
WAITS = """
import time
from reqtable.handover.taker import Taker

old_listen = Taker._listen


def listen(self):
    while not os.path.exists("failed"):
        time.sleep(0.01)
    old_listen(self)


Taker._listen = listen
"""
NOTES = """
old_fail = giver.Giver.fail


def fail(self, problem):
    old_fail(self, problem)
    open("failed", "w").close()


giver.Giver.fail = fail
"""
TOLD = {
    "SIGTERM": "os.kill(os.getpid(), signal.SIGTERM)",
    "SIGINT": "os.kill(os.getpid(), signal.SIGINT)",
}


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["rehearsing", "moving", "committing", "listening"])
@pytest.mark.parametrize("name", TOLD)
def test_an_old_process_that_is_told_to_end_ends_with_the_new_one(tmp_path: Path, name: str, phase: str) -> None:
    source = at(phase, TOLD[name]) + NOTES
    with Program(tmp_path, source, "unix://s.sock") as program:
        with Client(str(tmp_path / "s.sock"), socket.AF_UNIX) as client:
            ask(client, "add 1")
            program.change(next_version(source) + WAITS)
            program.kill(program.pid, signal.SIGUSR2)
            program.wait_for(f"at {phase}")
            assert client.rest() == b""  # idle clients see end of file
            for pid in program.pids:
                program.wait_exit(pid)
        assert not (tmp_path / "s.sock").exists()
        assert "Traceback" not in program.log


@pytest.mark.parametrize("name", TOLD)
def test_an_old_process_that_drains_leaves_the_new_one_alone(tmp_path: Path, name: str) -> None:
    source = at("draining", TOLD[name])
    with Program(tmp_path, source, "unix://s.sock") as program:
        with Client(str(tmp_path / "s.sock"), socket.AF_UNIX) as client:
            ask(client, "add 1")
            program.change(next_version(source))
            program.kill(program.pid, signal.SIGUSR2)
            program.wait_exit(program.pid)
            assert ask(client, "add 1") == (2, program.pids[1], "2")
        assert program.there == program.pids[1:]
        assert (tmp_path / "s.sock").exists()
        assert "Traceback" not in program.log


def test_a_hung_new_process_ends_with_the_old_one(tmp_path: Path) -> None:
    with Program(tmp_path) as program, program.client() as client:
        ask(client, "add 1")
        program.change("import time\nprint('it hangs', flush=True)\ntime.sleep(1000)\n")
        program.kill(program.pid, signal.SIGUSR2)
        program.wait_for("it hangs")
        program.kill(program.pid, signal.SIGTERM)
        for pid in program.pids:
            program.wait_exit(pid)


def test_a_second_restart_is_refused_with_one_line(tmp_path: Path) -> None:
    with Program(tmp_path) as program, program.client() as client:
        ask(client, "add 1")
        program.change("import time\nprint('it hangs', flush=True)\ntime.sleep(1000)\n")
        program.kill(program.pid, signal.SIGUSR2)
        program.wait_for("it hangs")
        status, body = program.operator().ask("/v1/restart", "POST", {"check": False})
        assert status == 409
        assert b"a restart is under way" in body
        program.kill(program.pid, signal.SIGUSR2)
        program.wait_for("ERROR SIGUSR2: a restart is under way")
        assert ask(client, "add 1") == (1, program.pid, "2")
        assert len(program.pids) == 2
        program.kill(program.pids[1], signal.SIGKILL)
        program.wait_for("this process goes on, because the new process was killed by SIGKILL")
        program.change(next_version(LEDGER))
        program.moved()
        assert ask(client, "add 1") == (2, program.pids[2], "3")


def test_a_process_that_drains_can_not_be_restarted(tmp_path: Path) -> None:
    with Program(tmp_path) as program, program.client() as client:
        ask(client, "add 1")
        client.send(b"take 10\n")  # so it is not idle
        program.operator().post("/v1/drain", {"stay": True})
        status, body = program.operator().ask("/v1/restart", "POST", {"check": False})
        assert (status, b"drains" in body) == (409, True), body
        assert len(program.pids) == 1
