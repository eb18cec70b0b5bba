"""The units in packaging/systemd: systemd accepts them, and what they start serves, reloads and drains."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from configparser import RawConfigParser
from pathlib import Path

import pytest

from tests.pages import blocks, check_command, commands, text_of
from tests.support import WAIT_S, Client
from tests.test_restart_systemd import Systemd

ROOT = Path(__file__).parent.parent
UNITS = sorted((ROOT / "packaging" / "systemd").iterdir())
PAGE = "docs/how-to/run-under-systemd.md"
EXPOSURE_MAX = 20  # of 100, as `systemd-analyze security` counts
APP = """
import reqtable

class Handler(reqtable.StateRequestHandler):
    @reqtable.state(reqtable.line())
    def only(self, text):
        self.send(text.upper())
        return self.only
"""
# Becomes the command of a unit, with a socket as systemd passes it.
ACTIVATED = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execvp(sys.argv[2], sys.argv[2:])
"""
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")


def installed(folder: Path) -> dict[str, str]:
    """Put the units there, for a program `notes`, with the page's changes. Returns the environment that finds them."""
    for unit in UNITS:
        text = re.sub(r"^(Exec\w+=)\S+", r"\1/bin/true", unit.read_text(), flags=re.MULTILINE)
        (folder / unit.name.replace("@", "@notes")).write_text(text)
    return {**os.environ, "SYSTEMD_UNIT_PATH": f"{folder}:"}


def analyzed(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = installed(folder)
    return subprocess.run(
        ["systemd-analyze", *command], env=environment, capture_output=True, text=True, timeout=WAIT_S, cwd=folder
    )


def wrong(folder: Path) -> list[str]:
    """Return what systemd says of the units in the folder. It may say something of others, which are the machine's."""
    done = analyzed(folder, "verify", "--man=no", "./reqtable@notes.service", "./reqtable@notes.socket")
    return [line for line in done.stderr.splitlines() if "reqtable@" in line]


def changes() -> list[tuple[str, str]]:
    """Return the page's changes of the units, each with its path below the folder of units."""
    found = (re.fullmatch(r"# /etc/systemd/system/(\S+)\n(.*)", each.text, re.DOTALL) for each in blocks(PAGE, "ini"))
    return [(each[1], each[2]) for each in found if each]


@needs_systemd
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    assert wrong(tmp_path) == []


@needs_systemd
def test_systemd_accepts_the_changes_of_the_page(tmp_path: Path) -> None:
    assert len(changes()) == 2
    for name, text in changes():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    assert wrong(tmp_path) == []
    (tmp_path / name).write_text(text + "ListenStraem=1\n")
    [found] = wrong(tmp_path)
    assert "ListenStraem" in found


@needs_systemd
def test_the_sandbox_is_tight(tmp_path: Path) -> None:
    limit = ("security", "--no-pager", "--offline=yes", f"--threshold={EXPOSURE_MAX}")
    done = analyzed(tmp_path, *limit, "./reqtable@notes.service")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_shows_the_units_themselves() -> None:
    shown = re.findall(r'^--8<-- "(\S+)"$', text_of(PAGE), re.MULTILINE)
    assert [ROOT / path for path in shown] == UNITS
    assert len(blocks(PAGE, "ini")) == len(shown) + len(changes())


def test_the_commands_of_the_page_fit_the_units() -> None:
    typed = [each.words for block in blocks(PAGE, "console") for each in commands(block)]
    assert {words[0] for words in typed} == {"sudo"}
    [units] = [words[2:] for words in typed if words[1] == "cp" and len(words) > 4]
    assert [ROOT / path for path in units[:-1]] == UNITS
    text = UNITS[0].read_text()
    [(program, *asked)] = [words[1:] for words in typed if words[1].endswith("/bin/reqtable")]
    assert f"ExecStart={program.replace('notes', '%i')} " in text
    check_command(asked)
    assert asked[-1].replace("notes", "%i") in text


class Unit:
    """Starts what the service unit starts, with its paths below `folder`, and tells its commands."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        reader = RawConfigParser(strict=False, interpolation=None)
        reader.optionxform = str  # type: ignore[assignment,method-assign]
        reader.read(UNITS[0])
        self.service = reader["Service"]
        for path in ("srv/notes", "etc/reqtable", f"run/{self._named('RuntimeDirectory')}"):
            (folder / path).mkdir(parents=True)
        (folder / "run" / self._named("RuntimeDirectory")).chmod(int(self.service["RuntimeDirectoryMode"], 8))
        (folder / "srv/notes/app.py").write_text(APP)
        (folder / "etc/reqtable/notes.toml").touch()

    def _named(self, key: str) -> str:
        return self.service[key].replace("%i", "notes")

    def command(self, key: str) -> list[str]:
        """Return a command of the unit, with this Python, and with the variables of the unit in place."""
        name, _, value = self.service["Environment"].partition("=")
        program, *words = shlex.split(self._named(key).replace(f"${{{name}}}", value))
        assert program == "/srv/notes/venv/bin/reqtable"
        words = [re.sub(r"^/(etc|run)/", rf"{self._folder}/\1/", word) for word in words]
        return [sys.executable, "-m", "reqtable", *words]

    def start(self, own: socket.socket, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", ACTIVATED, str(own.fileno()), *self.command("ExecStart")],
            cwd=self._folder / self._named("WorkingDirectory").lstrip("/"),
            env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
            pass_fds=[own.fileno()],
        )


def test_what_the_unit_starts_serves_and_reloads_and_drains(tmp_path: Path) -> None:
    unit, systemd = Unit(tmp_path), Systemd(tmp_path / "notify")
    try:
        with socket.create_server(("127.0.0.1", 0)) as own:
            process = unit.start(own, systemd.environment)
            try:
                assert systemd.up_to("READY")[-1][0] == process.pid
                with Client(own.getsockname()) as client:
                    assert client.ask(b"one\n") == b"ONE\n"
                    (tmp_path / "etc/reqtable/notes.toml").write_text("[limits]\nentries_max = 7\n")
                    reload = unit.command("ExecReload")
                    done = subprocess.run(reload, cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S)
                    assert (done.returncode, "limits.entries_max" in done.stdout) == (0, True), done
                    client.send(b"tw")  # so the request is not idle
                    process.terminate()
                    systemd.up_to("STOPPING")
                    client.send(b"o\n")
                    assert client.line() == b"TWO\n"
                assert process.wait(WAIT_S) == 0
            finally:
                process.kill()
                process.wait(WAIT_S)
    finally:
        systemd.socket.close()
