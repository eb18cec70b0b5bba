"""What can't move ends in the old process: it is counted beforehand, drained meanwhile, and cut off in time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.certificates import TLSClient, write_certificate
from tests.restarted import LEDGER, ROOT, Program, ask, next_version
from tests.support import Client

# Every kind that can't move: it waits for a file "go", or for the next line of its client.
STUCK = (
    LEDGER
    + """
import logging, time
from typing import Any
import reqtable
from reqtable import AsyncRequestHandler, BaseRequestHandler, call
from reqtable.http import HTTPRequestHandler


def wait_for_go():
    while not os.path.exists("go"):
        time.sleep(0.01)


class Calls(Ledger):
    @state(line())
    def asked(self, text):
        if text == b"stick\\n":
            return self.freed, call(wait_for_go)
        return super().asked(text)

    @state()
    def freed(self, _):
        return self.say("freed")


class Coroutine(AsyncRequestHandler):
    async def handle(self):
        while await self.read(line()):
            await self.send(b"%d %d again\\n" % (VERSION, os.getpid()))


class Blocking(BaseRequestHandler):
    def handle(self):
        while self.request.recv(100):
            self.request.sendall(b"%d %d again\\n" % (VERSION, os.getpid()))


class Green(Blocking):
    pass


class Forked(Blocking):
    pass


class Threads(reqtable.TCPServer):
    dispatch = "thread"


class Greenlets(reqtable.TCPServer):
    dispatch = "greenlet"


class Children(reqtable.TCPServer):
    dispatch = "fork"


class Web(HTTPRequestHandler):
    def do_GET(self):
        return self.freed, call(wait_for_go)

    @state()
    def freed(self, _):
        return self.answer(200, f"{VERSION}")


def server_of(kind, handler):
    return lambda address: kind(address, handler, bind_and_activate=False)


if __name__ == "__main__":
    logging.basicConfig(level=logging.DEBUG)
    places = {
        "2": Calls,
        "3": Coroutine,
        "4": server_of(Threads, Blocking),
        "5": server_of(Greenlets, Green),
        "6": server_of(Children, Forked),
        "7": Web,
    }
    binds = {f"tcp://127.0.0.{last}:0": each for last, each in places.items()}
    reqtable.serve({**binds, "tls://127.0.0.8:0?cert=server.pem": Ledger})
"""
)


def place(program: Program, last: int) -> tuple[str, int]:
    host = f"127.0.0.{last}"
    return host, int(program.wait_for(rf"on \w+://{host}:(\d+)")[0][1])


def test_each_kind_is_counted_drained_and_served_to_its_end(tmp_path: Path) -> None:
    certificate = write_certificate(tmp_path, "127.0.0.1", "127.0.0.8")
    source = STUCK.replace("server.pem", certificate)
    with Program(tmp_path, source, command=[sys.executable, "app.py"]) as program:
        clients = {last: (TLSClient if last == 8 else Client)(place(program, last)) for last in range(2, 9)}
        try:
            clients[2].send(b"stick\n")
            clients[7].send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            for last in (3, 4, 5, 6):
                assert clients[last].ask(b"x\n")[:2] == b"1 "
            assert ask(clients[8], "add 1") == (1, program.pid, "1")
            check = program.restart(check=True)
            assert sum(check["immovable"].values()) == 7, check
            assert check["left"] == 7
            text = shown(program, "restart", "--check")
            assert "can go on with 0 requests" in text
            for reason, count in check["immovable"].items():
                assert f"{count}  {reason}" in text
            program.change(next_version(source))
            outcome = program.restart()
            assert (outcome["problem"], outcome["moved"]) == (None, 0)
            assert outcome["immovable"] == check["immovable"]
            with Client(place(program, 3)) as other:
                assert other.ask(b"x\n") == b"2 %d again\n" % program.pids[-1]
            (tmp_path / "go").touch()
            assert clients[2].line() == b"1 %d freed\n" % program.pid
            assert b"connection: close" in head_of(clients[7]).lower()
            for last in (4, 6, 7):  # nobody knows whether a thread or a child is idle
                clients[last].close()
            program.wait_exit(program.pid)
            assert ask(clients[2], "add 1") == (2, program.pids[-1], "1")  # it has moved after its call
            for last in (3, 5, 8):
                assert clients[last].rest() == b"", last  # they were idle
        finally:
            for client in clients.values():
                client.close()


def head_of(client: Client) -> bytes:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += client.line()
    return head


def shown(program: Program, *arguments: str) -> str:
    """Return what a command prints."""
    command = [sys.executable, "-m", "reqtable", *arguments, "--control", str(program.control)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


def test_a_restart_may_be_refused_because_of_what_can_not_move(tmp_path: Path) -> None:
    config = '[restart]\nunmovable = "refuse"\n'
    with Program(tmp_path, STUCK, handler="Calls", config=config) as program:
        with program.client() as stuck, program.client() as client:
            stuck.send(b"stick\n")
            ask(client, "add 1")
            program.change(next_version(STUCK))
            program.operator().rows_once(lambda rows: any(each["state"] == "OFFLOADED" for each in rows))
            problem = program.refused()
            assert problem.startswith("some requests can't move: 1 because a call")
            assert ask(client, "add 1") == (1, program.pid, "2")
            assert "not restarted, the old process goes on: some requests can't move: 1" in shown(program, "restart")
            (tmp_path / "go").touch()
            assert stuck.line() == b"1 %d freed\n" % program.pid
            assert program.moved()["moved"] == 2
            assert ask(stuck, "add 1") == (2, program.pids[-1], "1")


def test_what_does_not_end_in_time_is_cut_off(tmp_path: Path) -> None:
    config = "[limits]\ndrain_timeout_s = 0.3\n"
    with Program(tmp_path, STUCK, handler="Calls", config=config) as program, program.client() as stuck:
        stuck.send(b"stick\n")
        program.operator().rows_once(lambda rows: any(each["state"] == "OFFLOADED" for each in rows))
        program.change(next_version(STUCK))
        program.restart()
        assert stuck.rest() == b""
        (tmp_path / "go").touch()
        program.wait_exit(program.pid)
        with program.client() as client:
            assert ask(client, "add 1") == (2, program.pids[-1], "1")
