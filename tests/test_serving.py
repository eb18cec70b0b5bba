"""What `serve()` and the commands that serve offer a program: several handlers, the engine, users, log files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import reqtable
from reqtable import Config, ConfigurationError, Engine, Limits, StateRequestHandler, line, state
from reqtable.run.privileges import Account
from tests.control import Operator
from tests.service import Service
from tests.support import WAIT_S, Client, Started

ROOT = Path(__file__).parent.parent


class Echo(StateRequestHandler):
    @state(line())
    def command(self, item: bytes) -> Any:
        self.send(item)
        return self.command


class Shout(StateRequestHandler):
    @state(line())
    def command(self, item: bytes) -> Any:
        self.send(item.upper())
        return self.command


def test_several_handlers_share_one_table() -> None:
    addresses: list[str] = []
    seen: list[Any] = []

    def talk(engine: Engine) -> None:
        clients = [Client(("127.0.0.1", int(each.rpartition(":")[2]))) for each in addresses]
        for client in clients:
            seen.append(client.ask(b"hello\n"))
        seen.append(sorted(row["handler"] for row in engine.table.snapshot()))
        for client in clients:
            client.close()
        engine.stop()

    threads: list[threading.Thread] = []

    def begin(engine: Engine) -> None:
        threads.append(threading.Thread(target=talk, args=(engine,)))
        engine.post(threads[0].start)

    binds = {"tcp://127.0.0.1:0": Echo, "tcp://localhost:0": Shout}
    reqtable.serve(binds, on_listening=addresses.extend, on_engine=begin)
    threads[0].join(WAIT_S)
    assert seen[:2] == [b"hello\n", b"HELLO\n"]
    assert seen[2] == ["Echo", "Shout"]


def test_a_mapping_takes_no_other_binds() -> None:
    for served, binds in [({"tcp://127.0.0.1:0": Echo}, ["tcp://127.0.0.1:0"]), ({}, [])]:
        with pytest.raises(ConfigurationError, match="takes no other binds"):
            reqtable.serve(served, *binds)


def test_a_server_shows_its_configuration() -> None:
    config = Config(limits=Limits(entries_max=7))
    with reqtable.TCPServer(("127.0.0.1", 0), Echo, config=config) as server:
        assert server.config is config
        server.reconfigure(Config(limits=Limits(entries_max=8)))
        assert server.config.limits.entries_max == 8


def test_a_program_without_logging_prints_where_it_serves() -> None:
    program = (
        "import reqtable, sys\n"
        "from tests.test_serving import Echo\n"
        "reqtable.serve(Echo, 'tcp://127.0.0.1:0', on_engine=lambda engine: engine.post(engine.stop))\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=WAIT_S)
    assert ran.stderr.startswith("serving Echo on tcp://127.0.0.1:")
    assert ran.returncode == 0


def test_each_worker_gives_access_to_its_engine() -> None:
    program = (
        "import os, reqtable\n"
        "from tests.test_serving import Echo\n"
        "def begin(engine):\n"
        "    engine.post(lambda: os.write(1, b'%d\\n' % os.getpid()))\n"  # one write: the workers share the pipe
        "reqtable.serve(Echo, 'tcp://127.0.0.1:0', workers=2, on_engine=begin)\n"
    )
    with Started([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            pids = {int(process.stdout.readline()) for _ in range(2)}
        finally:
            process.send_signal(signal.SIGINT)
    assert len(pids | {process.pid}) == 3


def test_a_log_file_that_was_renamed_is_opened_again(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    with Service("--log-file", str(log), "--control", str(tmp_path / "c.sock"), workers=None) as service:
        operator = operator_of(service, tmp_path / "c.sock")
        operator.ask("/v1/requests/1/cancel", "POST")
        assert "cancels 1" in log.read_text()
        log.rename(tmp_path / "server.log.1")
        operator.ask("/v1/requests/2/cancel", "POST")
        assert "cancels 2" in log.read_text()
        assert "cancels 2" not in (tmp_path / "server.log.1").read_text()
        assert service.lines == []


def operator_of(service: Service, path: Path) -> Operator:
    """Return an operator of a server that opens its control socket at `path` soon."""
    while not path.exists():
        assert service.process.poll() is None
    return Operator(path)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@needs_root
@pytest.mark.parametrize("workers", [None, 2])
def test_a_server_goes_on_as_another_user(tmp_path: Path, workers: int | None) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "XDG_RUNTIME_DIR"}
    environment |= {"TMPDIR": str(tmp_path), "HOME": "/"}
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o005 != 0o005:
            os.chmod(folder, 0o755)
    with Service("--user", "nobody", workers=workers, env=environment) as service:
        with Client(service.address) as client:
            client.send(b"x\n")
            nobody = Account.of("nobody", None)
            assert nobody is not None
            folder = tmp_path / f"reqtable-{nobody.user}"
            operator = operator_of(service, folder / f"{service.pid}.sock")
            assert folder.stat().st_uid == nobody.user
            operator.rows_once(lambda rows: len(rows) == 1)
            pids = [service.pid] if workers is None else [service.pid, *service.workers()]
            for pid in pids:
                status = Path(f"/proc/{pid}/status").read_text()
                for name, number in (("Uid", nobody.user), ("Gid", nobody.group)):
                    [found] = [each for each in status.splitlines() if each.startswith(f"{name}:")]
                    assert {int(each) for each in found.split()[1:]} == {number}
            command = [sys.executable, "-m", "reqtable", "ps"]
            ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WAIT_S)
            assert ran.returncode == 0, ran
            assert "Teller" in ran.stdout


@needs_root
def test_a_user_that_does_not_exist_is_refused_before_anything_is_bound() -> None:
    for given, words in [
        (("nosuchuser", None), "--user nosuchuser: there is no such user"),
        ((None, "x-y"), "--group x-y"),
    ]:
        with pytest.raises(ConfigurationError, match=words):
            Account.of(*given)


def test_only_root_can_become_another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ConfigurationError, match="only root can become another user"):
        Account.of("nobody", None)
    assert Account.of(None, None) is None


@pytest.mark.parametrize("workers", [None, 1])
def test_signals_are_handled_once_the_log_says_what_is_served(workers: int | None) -> None:
    """A SIGTERM right after that line must drain, and not kill."""
    program = (
        "import logging, os, reqtable, signal\n"
        "from tests.test_serving import Echo\n"
        "class Log(logging.Handler):\n"
        "    def emit(self, record): os.kill(os.getpid(), signal.SIGTERM)\n"
        "logging.getLogger('reqtable.serving').addHandler(Log())\n"
        "logging.getLogger('reqtable.serving').setLevel('INFO')\n"
        f"reqtable.serve(Echo, 'tcp://127.0.0.1:0', workers={workers})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=WAIT_S, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
