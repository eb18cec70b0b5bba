"""What the examples need of outgoing connections: errors that say what failed, and a log without tracebacks."""

from __future__ import annotations

import errno
import logging
import pickle
import socket
from typing import Any, ClassVar

import pytest

from reqtable import AsyncRequestHandler, ConnectFailed, System, connect
from reqtable.loop.platform import SYSTEM
from tests.support import WAIT_S, Client, served, wait_until


class Tells(AsyncRequestHandler):
    """Connects, and keeps the error. Then it raises the error."""

    target: ClassVar[str]
    timeout: ClassVar[float | None] = None
    raised: ClassVar[list[Any]] = []

    async def handle(self) -> None:
        try:
            upstream = await self.read(connect(self.target, timeout=self.timeout))
            await self.read(upstream.chunk())
        except OSError as error:
            self.raised.append(error)
            raise


@pytest.fixture
def tells(monkeypatch: pytest.MonkeyPatch) -> type[Tells]:
    monkeypatch.setattr(Tells, "raised", [])
    return Tells


@pytest.fixture
def refusing(unused_port: int) -> str:
    return f"tcp://127.0.0.1:{unused_port}"


def error_of(tells: type[Tells]) -> ConnectFailed:
    with served(tells) as server:
        with Client(server.server_address):
            wait_until(server, lambda: bool(tells.raised))
        wait_until(server, lambda: not len(server.table))
        assert server.stats()["finished"]["upstream"] == 1
    [error] = tells.raised
    return error  # type: ignore[no-any-return]


def test_a_failed_connection_is_one_line_in_the_log(
    tells: type[Tells], refusing: str, caplog: pytest.LogCaptureFixture
) -> None:
    tells.target = refusing
    error_of(tells)
    [record] = [each for each in caplog.records if each.name == "reqtable"]
    assert record.levelno == logging.WARNING
    assert record.getMessage().endswith(f": can't connect to {refusing}: connection refused")
    assert not record.exc_info


def test_a_broken_connection_is_one_line_that_names_it(tells: type[Tells], caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, served(tells) as server:
        tells.target = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        listener.settimeout(WAIT_S)
        with Client(server.server_address):
            upstream, _ = listener.accept()
            wait_until(server, lambda: server.table.connection_counts["opened"] == 1)
            upstream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            upstream.close()
            wait_until(server, lambda: bool(tells.raised))
    [record] = [each for each in caplog.records if each.name == "reqtable"]
    assert record.levelno == logging.WARNING
    assert f": {tells.target}: " in record.getMessage()
    assert not record.exc_info


def test_the_error_has_the_systems_number(tells: type[Tells], refusing: str) -> None:
    tells.target = refusing
    error = error_of(tells)
    assert error.errno == errno.ECONNREFUSED
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.errno) == (str(error), error.errno)


def test_the_error_of_a_missing_unix_socket(tells: type[Tells]) -> None:
    tells.target = "unix:///nowhere/at.all"
    assert error_of(tells).errno == errno.ENOENT


def test_the_error_of_a_name_that_can_not_be_looked_up(tells: type[Tells]) -> None:
    def getaddrinfo(*arguments: Any, **options: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    tells.target = "tcp://no.such.name:80"
    before = SYSTEM.set(System(getaddrinfo=getaddrinfo))
    try:
        error = error_of(tells)
    finally:
        SYSTEM.reset(before)
    assert error.errno is None, "the numbers of look-ups are others than those of the system"
    assert isinstance(error.__cause__, socket.gaierror)
    assert error.reason == "no.such.name can't be looked up: name or service not known"


def test_the_error_of_a_timeout(tells: type[Tells], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        address = full.getsockname()
        tells.target = f"tcp://127.0.0.1:{address[1]}"
        monkeypatch.setattr(Tells, "timeout", 0.05)
        with socket.create_connection(address):  # the queue is full: the kernel drops the next SYN
            assert error_of(tells).errno == errno.ETIMEDOUT
