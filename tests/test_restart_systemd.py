"""What systemd hears of a restart (sd_notify(3)), from which process, and in which order."""

from __future__ import annotations

import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.restarted import LEDGER, Program, ask, next_version
from tests.support import WAIT_S

Told = tuple[int, dict[str, str]]


class Systemd:
    """Receives the messages of a service, with the process that has sent each (SO_PASSCRED in unix(7))."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.socket.settimeout(WAIT_S)
        self.socket.bind(str(path))
        self.environment = {"NOTIFY_SOCKET": str(path)}

    def told(self) -> Told:
        data, [(_, _, credentials)], _, _ = self.socket.recvmsg(4096, 64)
        return struct.unpack("3i", credentials)[0], dict(line.split("=", 1) for line in data.decode().splitlines())

    def up_to(self, variable: str) -> list[Told]:
        """Return all messages up to one with that variable."""
        found = [self.told()]
        while variable not in found[-1][1]:
            found.append(self.told())
        return found


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    own = Systemd(tmp_path / "notify")
    yield own
    own.socket.close()


def test_the_old_process_tells_of_the_restart_and_names_the_new_one(tmp_path: Path, systemd: Systemd) -> None:
    with Program(tmp_path, environment=systemd.environment) as program, program.client() as client:
        assert systemd.up_to("READY")[-1][0] == program.pid
        ask(client, "add 1")
        pid = program.pid
        for generation in (2, 3):
            program.change(next_version(LEDGER, generation))
            program.moved()
            new = program.pids[-1]
            [first, last] = systemd.up_to("MAINPID")
            assert (first[0], list(first[1])) == (pid, ["RELOADING", "MONOTONIC_USEC"])
            assert last == (pid, {"MAINPID": str(new), "READY": "1", "STATUS": "serving"})
            pid = new
        assert ask(client, "env NOTIFY_SOCKET").rest == "-"
        program.kill(pid, signal.SIGTERM)
        assert systemd.up_to("STOPPING")[0][0] == pid  # and the old ones have said nothing more


def test_a_restart_that_fails_ends_with_ready(tmp_path: Path, systemd: Systemd) -> None:
    with Program(tmp_path, environment=systemd.environment) as program:
        systemd.up_to("READY")
        assert program.restart(check=True)["problem"] is None
        program.change("raise RuntimeError")
        program.refused()
        told = systemd.up_to("READY")
        assert [sender for sender, _ in told] == [program.pid] * 2, told
        [first, last] = told
        assert "RELOADING" in first[1]  # of the restart: a check says nothing
        assert last[1]["STATUS"].startswith("serving; the restart failed: the new process can't start: ")


def test_the_old_process_takes_its_place_back(tmp_path: Path, systemd: Systemd) -> None:
    source = LEDGER + "\nfrom reqtable import call\nLedger.asked_before = Ledger.asked\n"
    source += "\n\nclass Ledger(Ledger):\n    @state(line())\n    def asked(self, text):\n"
    source += "        if text == b'stick\\n':\n            return self.awake, call(__import__('time').sleep, 1000)\n"
    source += "        return super().asked(text)\n"
    with Program(tmp_path, source, environment=systemd.environment) as program, program.client() as client:
        systemd.up_to("READY")
        client.send(b"stick\n")
        program.operator().rows_once(lambda rows: [each["state"] for each in rows] == ["OFFLOADED"])
        program.restart()
        systemd.up_to("MAINPID")
        program.kill(program.pids[1])
        sender, told = systemd.up_to("MAINPID")[-1]
        assert (sender, told["MAINPID"], told["READY"]) == (program.pid, str(program.pid), "1")
        with program.client() as other:
            assert ask(other, "add 1") == (1, program.pid, "1")


def test_the_new_process_feeds_the_watchdog(tmp_path: Path, systemd: Systemd) -> None:
    environment = {**systemd.environment, "WATCHDOG_USEC": "400000"}
    with Program(tmp_path, environment=environment) as program:
        assert systemd.up_to("WATCHDOG")[-1][0] == program.pid
        program.kill(program.pid, signal.SIGUSR2)
        before = systemd.up_to("MAINPID")
        assert before[-1][0] == program.pid
        assert all("WATCHDOG" in told for sender, told in before if sender != program.pid)
        for _ in range(3):
            assert systemd.up_to("WATCHDOG")[-1][0] == program.pids[1]


def test_supervisors_tell_the_same(tmp_path: Path, systemd: Systemd) -> None:
    with Program(tmp_path, arguments=["--workers=2"], environment=systemd.environment) as program:
        systemd.up_to("READY")
        program.wait_for("2 of 2 workers are ready")
        assert program.restart(check=True)["problem"] is None
        program.kill(program.pid, signal.SIGUSR2)
        told = systemd.up_to("MAINPID")
        new = program.pids[-1]
        others = [(sender, text) for sender, text in told if sender != program.pid]  # not the check's
        assert all(sender == new and "STOPPING" not in text for sender, text in others), others
        assert "RELOADING" in told[0][1]
        assert told[-1][1] == {"MAINPID": str(new), "READY": "1", "STATUS": "serving"}
        program.wait_exit(program.pid)
        program.kill(new, signal.SIGTERM)
        assert systemd.up_to("STOPPING")[-1][0] == new
