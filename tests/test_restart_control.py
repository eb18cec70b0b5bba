"""Operators reach the new process: its control socket, its page, its metrics; and its numbers count a request once."""

from __future__ import annotations

import http.client
from pathlib import Path
from typing import Any

from tests.control import Operator
from tests.restarted import LEDGER, Program, ask, next_version
from tests.support import WAIT_S


def page_of(port: int) -> int:
    """Return the status of the answer at a port."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status
    finally:
        connection.close()


def test_the_ports_and_the_socket_come_over(tmp_path: Path, unused_port: int) -> None:
    config = f'[control]\nmetrics = "127.0.0.1:{unused_port}"\n'
    with Program(tmp_path, config=config) as program, program.client() as client:
        ask(client, "add 1")
        for generation in (2, 3):
            assert page_of(unused_port) == 200
            program.change(next_version(LEDGER, generation))
            program.moved()
            [worker] = program.operator().get("/v1/workers")
            assert worker["worker"] == program.pids[-1]
            program.wait_for(rf"control: listening on \S*:{unused_port}", generation)
        assert page_of(unused_port) == 200
        assert ask(client, "add 1") == (3, program.pids[-1], "2")


def test_default_sockets_are_those_of_the_processes(tmp_path: Path) -> None:
    """Each has a path of its own. The old one removes its path."""
    folder = tmp_path / "reqtable"
    environment = {"XDG_RUNTIME_DIR": str(tmp_path), "REQTABLE_CONTROL": None}
    with Program(tmp_path, environment=environment) as program:
        program.control = folder / f"{program.pid}.sock"
        assert [each.name for each in folder.iterdir()] == [f"{program.pid}.sock"]
        program.change(next_version(LEDGER))
        program.moved()
        assert [each.name for each in folder.iterdir()] == [f"{program.pids[1]}.sock"]
        assert Operator(folder / f"{program.pids[1]}.sock").get("/v1/requests") == []


def test_a_moved_request_ends_once_in_logs_and_numbers(tmp_path: Path) -> None:
    with Program(tmp_path, arguments=["--access-log"]) as program:
        with program.client() as client:
            ask(client, "add 1")
            program.change(next_version(LEDGER))
            program.moved()
            ask(client, "add 22")
        assert len(program.wait_for(r"Ledger done in .*, 13 in")) == 1
        [counts] = found_in(program.operator().get("/v1/stats"), "finished")
        assert (counts["done"], counts["moved"]) == (1, 0)


def found_in(data: Any, key: str) -> list[Any]:
    """Return what plain data has under that key at the smallest depth."""
    if isinstance(data, list):
        data = dict(enumerate(data))
    if not isinstance(data, dict):
        return []
    return [data[key]] if key in data else [each for value in data.values() for each in found_in(value, key)][:1]
