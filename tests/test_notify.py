"""Messages to systemd (sd_notify(3)), which a datagram socket receives in its place."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service import WAIT_S, Service
from tests.support import Client


class Systemd:
    """Receives the messages of a service, in place of systemd."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.settimeout(WAIT_S)
        self.socket.bind(address)
        self.environment = {**os.environ, "NOTIFY_SOCKET": address.replace("\0", "@")}

    def told(self) -> dict[str, str]:
        """Return the next message."""
        return dict(line.split("=", 1) for line in self.socket.recv(4096).decode().splitlines())

    def wait_for(self, variable: str) -> dict[str, str]:
        while variable not in (told := self.told()):
            pass
        return told

    def is_silent_for(self, seconds: float) -> bool:
        self.socket.settimeout(seconds)
        try:
            self.socket.recv(4096)
        except TimeoutError:
            return True
        finally:
            self.socket.settimeout(WAIT_S)
        return False


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Systemd]:
    own = Systemd(f"{tmp_path}/notify" if request.param == "path" else f"\0reqtable-notify-{os.getpid()}")
    yield own
    own.socket.close()


@pytest.mark.parametrize("workers", [None, 2])
def test_it_is_told_of_each_turn(systemd: Systemd, workers: int | None, tmp_path: Path) -> None:
    path = tmp_path / "reqtable.toml"
    path.write_text("")
    with Service("--config", str(path), workers=workers, env=systemd.environment) as service:
        assert systemd.wait_for("READY")["STATUS"] == ("2 of 2 workers are ready" if workers else "serving")
        assert [service.ask(f"env {name}") for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC")] == ["-", "-"]
        for text in ("[limits]\nentries_max = 10\n", "nonsense = 1\n"):
            path.write_text(text)
            service.signal(signal.SIGHUP)
            told = systemd.told()
            assert list(told) == ["RELOADING", "MONOTONIC_USEC"]
            assert int(told["MONOTONIC_USEC"]) > 0
            assert systemd.wait_for("READY")["READY"] == "1"
        service.signal(signal.SIGTERM)
        assert systemd.wait_for("STOPPING")["STOPPING"] == "1"
        assert service.wait() == 0


def test_workers_are_ready_when_all_are(systemd: Systemd) -> None:
    with Service(workers=3, env=systemd.environment) as service:
        told = []
        while not told or "READY" not in told[-1]:
            told.append(systemd.told())
        assert told[-1] == {"READY": "1", "STATUS": "3 of 3 workers are ready"}
        assert all(each["STATUS"] in {f"{n} of 3 workers are ready" for n in range(3)} for each in told[:-1])
        os.kill(service.workers()[0], signal.SIGKILL)
        assert systemd.told() == {"STATUS": "2 of 3 workers are ready"}
        assert systemd.wait_for("READY")["STATUS"] == "3 of 3 workers are ready"


@pytest.mark.parametrize("workers", [None, 2])
def test_the_watchdog_is_fed_while_every_loop_goes_round(systemd: Systemd, workers: int | None) -> None:
    environment = {**systemd.environment, "WATCHDOG_USEC": "200000"}
    with Service(workers=workers, env=environment) as service:
        systemd.wait_for("READY")
        for _ in range(5):
            systemd.wait_for("WATCHDOG")
        with Client(service.address) as client:
            client.ask(b"pid\n")
            client.send(b"block 0.8\n")
            while not systemd.is_silent_for(0.4):  # a few may be on their way
                pass
            systemd.wait_for("WATCHDOG")  # and again, once it goes round again


def test_a_watchdog_of_another_process_is_not_fed(systemd: Systemd) -> None:
    environment = {**systemd.environment, "WATCHDOG_USEC": "20000", "WATCHDOG_PID": "1"}
    with Service(workers=None, env=environment):
        systemd.wait_for("READY")
        assert systemd.is_silent_for(0.2)


def test_nobody_is_told_where_nobody_asks() -> None:
    environment = {**os.environ, "WATCHDOG_USEC": "20000", "NOTIFY_SOCKET": "/no/such/socket"}
    with Service(env=environment) as service:
        service.wait_for("workers are ready")
        service.signal(signal.SIGTERM)
        assert service.wait() == 0
        assert len(service.lines) == 1
