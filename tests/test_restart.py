"""Hot restarts with real processes: new code, every transport, every way to start a program."""

from __future__ import annotations

import os
import socket
import stat
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.restarted import LEDGER, SESSION, Program, ask, next_version
from tests.support import WAIT_S, Client

OTHER_SHAPE = """
import os
from reqtable import StateRequestHandler, line, state


class Ledger(StateRequestHandler):
    state_version = 2
    entries: tuple = ()
    name: str = ""
    total: int = 0

    @classmethod
    def migrate(cls, version, state, fields):
        assert version == 1
        del fields["unused"]
        fields["entries"] = tuple(fields["entries"])
        return {"asked": "next_question"}[state], {**fields, "name": "of old"}

    @state(line())
    def next_question(self, text):
        self.entries += (text.decode().strip(),)
        self.send(f"2 {os.getpid()} {self.entries} {self.name}\\n".encode())
        return self.next_question
"""
FIRST_SHAPE = """
import os
from reqtable import StateRequestHandler, line, state


class Ledger(StateRequestHandler):
    state_version = 1
    entries: list = []
    unused: bool = True
    total: int = 0

    @state(line())
    def asked(self, text):
        self.entries.append(text.decode().strip())
        self.send(f"1 {os.getpid()} {self.entries}\\n".encode())
        return self.asked
"""
EVERYWHERE = (
    SESSION
    + """

def make(address):
    return reqtable.TCPServer(address, Ledger, bind_and_activate=False)


BINDS = {
    "tcp://127.0.0.1:0": Ledger,
    "tcp://127.0.0.2:0": make,
    "unix://s.sock?mode=640": Ledger,
    "unix://@NAME": Ledger,
    "udp://127.0.0.1:0": Session,
    "unixgram://d.sock": Session,
}
"""
)


def main(arguments: str) -> str:
    """Return the end of a program that serves by itself."""
    return f"""
if __name__ == "__main__":
    import logging, reqtable

    logging.basicConfig(level=logging.DEBUG)
    reqtable.serve({arguments})
"""


def test_the_new_code_goes_on_with_connections_and_gets_new_ones(tmp_path: Path) -> None:
    with Program(tmp_path) as program, program.client() as client:
        assert ask(client, "add 3") == (1, program.pid, "3")
        for generation in (2, 3):  # a restart of a restart
            program.change(next_version(LEDGER, generation))
            assert program.moved()["moved"] == 1
            assert ask(client, "add 4")[:2] == (generation, program.pids[-1])
            with program.client() as other:
                assert ask(other, "add 1") == (generation, program.pids[-1], "1")
            assert program.there == [program.pids[-1]]
        assert ask(client, "add 0").rest == "11"


def test_fields_and_states_may_change(tmp_path: Path) -> None:
    with Program(tmp_path, FIRST_SHAPE) as program, program.client() as client:
        assert ask(client, "one").rest == "['one']"
        client.send(b"tw")  # the state waits for the rest
        program.change(OTHER_SHAPE)
        program.moved()
        assert ask(client, "o") == (2, program.pids[1], "('one', 'two') of old")


@pytest.mark.parametrize("dispatch", ["greenlet", "pool", "executor"])
def test_state_machines_move_under_every_policy_that_keeps_them_on_the_loop(tmp_path: Path, dispatch: str) -> None:
    with Program(tmp_path, arguments=[f"--dispatch={dispatch}"]) as program, program.client() as client:
        ask(client, "add 3")
        program.change(next_version(LEDGER))
        assert program.moved()["moved"] == 1
        assert ask(client, "add 4") == (2, ask(client, "add 0").pid, "7")


class Talker:
    """Sends datagrams from one socket."""

    def __init__(self, family: int, to: Any, own: str = "") -> None:
        self.socket = socket.socket(family, socket.SOCK_DGRAM)
        self.socket.settimeout(WAIT_S)
        self.socket.bind(own or ("127.0.0.1", 0))
        self.socket.connect(to)

    def ask(self) -> list[str]:
        self.socket.send(b"hello")
        return self.socket.recv(100).decode().split()


@pytest.mark.parametrize("way", ["script", "module"])
def test_every_transport_moves(tmp_path: Path, way: str) -> None:
    name = f"reqtable-{os.getpid()}-{way}"
    source = LEDGER + EVERYWHERE.replace("NAME", name) + main("BINDS")
    command = [sys.executable, *(["app.py"] if way == "script" else ["-m", "app"])]
    with Program(tmp_path, source, command=command) as program:
        places = [(match[1], int(match[2])) for match in program.wait_for(r"on tcp://(127.0.0.\d):(\d+)", 2)]
        path, datagrams = str(tmp_path / "s.sock"), str(tmp_path / "d.sock")
        before = os.stat(path)
        assert stat.S_IMODE(before.st_mode) == 0o640

        def newcomers() -> list[Client]:
            unix = [Client(place, socket.AF_UNIX) for place in (path, f"\0{name}")]
            return [*(Client(place) for place in places), *unix]

        clients = newcomers()
        udp = Talker(socket.AF_INET, program.place("udp"))
        unixgram = Talker(socket.AF_UNIX, datagrams, str(tmp_path / "own"))
        try:
            assert [ask(client, "add 1").rest for client in clients] == ["1"] * 4
            assert [udp.ask(), unixgram.ask()] == [["1", str(program.pid), "1"]] * 2
            for generation in (2, 3):
                program.change(next_version(source, generation))
                assert program.moved()["moved"] == 6
                pid = program.pids[-1]
                assert [ask(client, "add 1") for client in clients] == [(generation, pid, str(generation))] * 4
                assert [udp.ask(), unixgram.ask()] == [[str(generation), str(pid), str(generation)]] * 2
                others = newcomers()
                assert [ask(client, "add 1") for client in others] == [(generation, pid, "1")] * 4
                for client in others:
                    client.close()
                assert (os.stat(path).st_ino, stat.S_IMODE(os.stat(path).st_mode)) == (before.st_ino, 0o640)
        finally:
            for each in (*clients, udp.socket, unixgram.socket):
                each.close()
        program.kill(program.pids[-1], 15)
        program.wait_exit(program.pids[-1])
        assert not os.path.exists(path)
        assert not os.path.exists(datagrams)


def test_binds_may_come_and_go(tmp_path: Path) -> None:
    source = LEDGER + main('Ledger, "tcp://127.0.0.1:0", "unix://old.sock", "unix://kept.sock?mode=600"')
    other = LEDGER + main('Ledger, "unix://kept.sock?mode=660", "tcp://127.0.0.1:0", "unix://new.sock"')
    with Program(tmp_path, source, command=[sys.executable, "app.py"]) as program:
        kept = Client(str(tmp_path / "kept.sock"), socket.AF_UNIX)
        gone = Client(str(tmp_path / "old.sock"), socket.AF_UNIX)
        with kept, gone, program.client() as tcp:
            for client in (kept, gone, tcp):
                ask(client, "add 1")
            program.change(next_version(other))
            assert program.moved()["moved"] == 2
            assert gone.rest() == b""  # it was idle: the old process has told it that it ends
            assert [ask(client, "add 1") for client in (kept, tcp)] == [(2, program.pids[1], "2")] * 2
            assert sorted(each.name for each in tmp_path.glob("*.sock")) == ["c.sock", "kept.sock", "new.sock"]
            with Client(str(tmp_path / "new.sock"), socket.AF_UNIX) as client:
                assert ask(client, "add 1") == (2, program.pids[1], "1")
            with program.client() as client:
                assert ask(client, "add 1") == (2, program.pids[1], "1")


@pytest.mark.parametrize("named", [False, True])
def test_sockets_of_systemd_move_and_stay_its_own(tmp_path: Path, named: bool) -> None:
    """The new process is not passed any: it has them from the old one."""
    path = tmp_path / "activated.sock"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(path))
        unix.listen()
        binds = ["--bind=fd://web", "--bind=fd://local"] if named else []
        command = [sys.executable, "-m", "reqtable", "serve", "app.py:Ledger", *binds, "--log-level=debug"]
        code = (
            f"import os; os.dup2({tcp.fileno()}, 100); os.dup2({unix.fileno()}, 101); "
            "os.dup2(100, 3); os.dup2(101, 4); "
            "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='2', LISTEN_FDNAMES='web:local'); "
            f"os.closerange(5, 102); os.execv({command[0]!r}, {command!r})"
        )
        passed = (tcp.fileno(), unix.fileno())
        with Program(tmp_path, command=[sys.executable, "-c", code], pass_fds=passed) as program:
            clients = [Client(tcp.getsockname()), Client(str(path), socket.AF_UNIX)]
            try:
                for client in clients:
                    ask(client, "add 1")
                for generation in (2, 3):
                    program.change(next_version(LEDGER, generation))
                    assert program.moved()["moved"] == 2
                    answers = [ask(client, "add 1") for client in clients]
                    assert answers == [(generation, program.pids[-1], str(generation))] * 2
                with Client(str(path), socket.AF_UNIX) as other:
                    assert ask(other, "add 1")[:2] == (3, program.pids[-1])
            finally:
                for client in clients:
                    client.close()
            program.kill(program.pids[-1], 15)
            program.wait_exit(program.pids[-1])
        assert path.is_socket()


def test_requests_behind_a_proxy_move(tmp_path: Path) -> None:
    header = b"PROXY TCP4 203.0.113.7 198.51.100.1 5000 7000\r\n"
    with (
        Program(tmp_path, config='[proxy]\ntrusted = ["127.0.0.1"]\n') as program,
        program.client() as client,
        program.client() as half,
    ):
        assert ask(client.send(header), "add 1").rest == "1"
        half.send(header[:9])
        wait_for_rows(program, 2)
        program.change(next_version(LEDGER))
        outcome = program.restart()
        assert outcome["moved"] == 1
        assert outcome["immovable"] == {"its PROXY header or its TLS handshake has not come": 1}
        assert ask(client, "add 1") == (2, outcome["pid"], "2")
        [row] = program.operator().get("/v1/requests")
        assert (row["peer"], row["moves"]) == ("203.0.113.7:5000", 1)
        assert ask(half.send(header[9:]), "add 5").rest == "5"  # by either process
        with program.client() as other:
            assert ask(other.send(header), "add 3") == (2, outcome["pid"], "3")


def wait_for_rows(program: Program, count: int) -> None:
    until = time.monotonic() + WAIT_S
    while len(program.operator().get("/v1/requests")) != count:
        assert time.monotonic() < until


def test_another_command_may_start_the_next_version(tmp_path: Path) -> None:
    """A shell in between has the process as its child: systemd must hear of that one."""
    (tmp_path / "start").write_text(
        f"{sys.executable} -m reqtable serve app.py:Ledger --bind tcp://127.0.0.1:0\nexit 3\n"
    )
    with Program(tmp_path, config='[restart]\ncommand = ["sh", "start"]\n') as program, program.client() as client:
        ask(client, "add 1")
        program.change(next_version(LEDGER))
        outcome = program.moved()
        answer = ask(client, "add 1")
        assert answer == (2, outcome["pid"], "2")
        assert outcome["pid"] != program.pids[1]  # the shell


def test_a_server_with_a_timeout_of_its_own_moves(tmp_path: Path) -> None:
    """The blocking mode belongs to the open socket, which both processes have (O_NONBLOCK in open(2))."""
    source = f"{LEDGER}\nimport reqtable\n\n\nclass Server(reqtable.TCPServer):\n    def server_activate(self):\n"
    source += "        super().server_activate()\n        self.socket.settimeout(5)\n"
    source += main("Server, 'tcp://127.0.0.1:0', handler=Ledger")
    with Program(tmp_path, source, command=[sys.executable, "app.py"]) as program, program.client() as client:
        ask(client, "add 1")
        program.change(next_version(source))
        program.moved()
        assert ask(client, "add 1") == (2, program.pids[1], "2")
        with program.client() as other:
            assert ask(other, "add 1") == (2, program.pids[1], "1")
