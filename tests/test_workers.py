"""Workers: the effect of each signal, replacing dead workers, and losing only the requests of a dead worker."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import reqtable
from reqtable import Config, ConfigurationError
from reqtable.dispatch import policy_names
from tests.restarted import LEDGER, Program, answer_of
from tests.service import WAIT_S, Load, Service, kill_workers, reload_times, state_of, wait_gone
from tests.support import Client, Started, slow_but
from tests.test_cli import ROOT, run

READY = r"(\d+) of \1 workers are ready"


@pytest.fixture
def service() -> Iterator[Service]:
    """Run a service with two ready workers. Check that none of its processes is left at the end."""
    with Service() as made:
        made.wait_for(READY)
        yield made
        pids = made.workers()
        if made.process.poll() is None:
            made.signal(signal.SIGTERM)
            assert made.wait() == 0, made.lines
    wait_gone(pids)


def until(condition: Callable[[], bool]) -> None:
    """Poll until the condition holds. Only for effects in other processes, which no event reports."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "it never came to hold"
        time.sleep(0.005)


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


# -- serving ----------------------------------------------------------------------------------------------------------


def test_workers_serve_and_the_supervisor_does_not(service: Service) -> None:
    workers = {str(pid) for pid in service.workers()}
    assert len(workers) == 2
    answered = {service.ask("pid") for _ in range(50)}
    assert answered
    assert answered <= workers


@pytest.mark.parametrize("dispatch", slow_but(policy_names(), "greenlet", "fork"))
def test_every_policy_has_workers(dispatch: str) -> None:
    handler = "tests/teller.py:" + ("Blocking" if dispatch == "greenlet" else "Teller")
    with Service("--dispatch", dispatch, handler=handler) as service:
        service.wait_for(READY)
        load = Load(service.address, clients=4, requests=5, in_one_process=dispatch != "executor")
        with load:
            reload_times(service, 1)
            until(lambda: load.asked > 100)
        assert load.failed == []
        pids = service.workers()
        service.signal(signal.SIGTERM)
        assert service.wait() == 0
        wait_gone(pids)
        assert [line for line in service.lines if "WARNING" in line or "ERROR" in line] == []


def test_the_log_says_which_process_it_is_of(service: Service) -> None:
    service.signal(signal.SIGUSR1)
    service.wait_for(r" 0 requests$", 2)
    said = {int(match[1]) for match in service.wait_for(r"^\S+ \S+ (\d+) INFO 0 requests$", 2)}
    assert said == set(service.workers())
    service.wait_for(rf"^\S+ \S+ {service.pid} INFO 2 workers, 2 wanted$")
    service.wait_for(rf"^{service.workers()[0]} serving, \d+ s old$")


def test_the_log_as_json_says_it_too() -> None:
    with Service("--log-format", "json") as service:
        service.wait_for("workers are ready")
        assert json.loads(service.lines[0])["pid"] == service.pid
        served = json.loads(service.served)
    assert served["pid"] == service.pid
    assert served["message"] == f"serving Teller on tcp://127.0.0.1:{service.address[1]}"


# -- those that die ---------------------------------------------------------------------------------------------------


def test_who_is_killed_loses_only_its_own_connections(service: Service) -> None:
    with Load(service.address, clients=12, requests=20) as load:
        victims = kill_workers(service, load, 2)
    assert {pid for pid, _ in load.failed} <= {0, *victims}
    assert len(load.failed) <= sum(victims.values())
    assert {how for _, how in load.failed} <= {"ConnectionError", "ConnectionResetError", "BrokenPipeError"}


@pytest.mark.parametrize(
    ("question", "words"), [("exit 3", "exited with status 3"), ("exit 0", "ended by itself")], ids=["badly", "well"]
)
def test_who_ends_by_itself_is_replaced_and_the_log_says_how(service: Service, question: str, words: str) -> None:
    before = service.workers()
    service.ask(question)
    [died] = service.wait_for(rf"worker (\d+) {words} after [\d.]+ s; another one starts ")
    until(lambda: len(service.workers()) == 2)
    assert set(before) - set(service.workers()) == {int(died[1])}


def test_who_fails_at_once_is_started_ever_less_often(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(
        "import os\nfrom tests.teller import Teller\nos.register_at_fork(after_in_child=lambda: os._exit(3))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with Service(handler=f"{tmp_path}/failing.py:Teller", env=env) as service:
        service.wait_for(r"exited with status 3 after", 8)
        said = [match[1] for match in service.wait_for(r"another one starts in ([\d.]+) s", 8)]
        assert said == ["0.1", "0.1", "0.2", "0.2", "0.4", "0.4", "0.8", "0.8"]
        service.signal(signal.SIGTERM)
        assert service.wait() == 0


def test_without_descriptors_it_waits_for_some(service: Service) -> None:
    limits = resource.prlimit(service.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(service.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    [victim, survivor] = service.workers()
    os.kill(victim, signal.SIGKILL)
    service.wait_for(r"a worker can't be started, next try in 0\.\d s: \[Errno 24\]", 2)
    assert service.ask("pid") == str(survivor)
    resource.prlimit(service.pid, resource.RLIMIT_NOFILE, limits)
    service.wait_for(READY, 2)


def test_without_a_supervisor_they_let_the_port_go_and_finish(service: Service) -> None:
    workers = service.workers()
    with Client(service.address) as busy:
        busy.ask(b"take 5\n")
        service.signal(signal.SIGKILL)
        service.wait()
        service.wait_for("ending when 1 request is done, or in 30 s$")
        until(lambda: _is_free(service.address))
        assert busy.ask(b"12345") == b"5\n"
    wait_gone(workers)


def _is_free(address: tuple[str, int]) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen()
        except OSError:
            return False
        return True


# -- reloading --------------------------------------------------------------------------------------------------------


def test_reloading_fails_no_request_and_keeps_nothing(service: Service) -> None:
    before = service.workers()
    open_before = [descriptors(pid) for pid in (service.pid, *before)]
    with Load(service.address, clients=12, requests=5) as load:
        reload_times(service, 3)
    assert load.failed == []
    until(lambda: len(service.workers()) == 2)
    assert not set(before) & set(service.workers())
    until(lambda: [descriptors(pid) for pid in (service.pid, *service.workers())] == open_before)


def test_a_changed_number_is_taken_and_a_bad_file_is_not(tmp_path: Path) -> None:
    path = tmp_path / "reqtable.toml"
    path.write_text("workers = 1\n")
    with Service("--config", str(path), workers=None) as service:
        service.wait_for("1 of 1 workers are ready")
        path.write_text("workers = 3\n[limits]\nentries_max = 7\n")
        service.signal(signal.SIGHUP)
        service.wait_for("3 of 3 workers are ready")
        until(lambda: len(service.workers()) == 3)
        before = service.workers()
        path.write_text("workers = 'x'\n")
        service.signal(signal.SIGHUP)
        service.wait_for(
            rf"the new configuration was refused, the old one stays in force: {path}:1: workers must be a whole number"
        )
        path.write_text("dispatch = 'nowhere'\n")
        service.signal(signal.SIGHUP)
        service.wait_for("the old one stays in force: .*there is no dispatch policy 'nowhere'")
        assert service.workers() == before
        path.write_text("")
        service.signal(signal.SIGHUP)
        service.wait_for("3 of 3 workers are ready", 2)


def test_a_storm_of_reloads_ends_with_one_after_the_last(service: Service) -> None:
    with Load(service.address, clients=8, requests=5) as load:
        for _ in range(100):
            service.reload()
            time.sleep(0.002)
        own = re.compile(rf" {service.pid} INFO (.*)")
        until(lambda: own.findall("\n".join(service.lines))[-1] == "2 of 2 workers are ready")
    read = len(service.wait_for("the configuration was read again"))
    assert load.failed == []
    assert 1 < read < 50, "those that came meanwhile are one"


def test_one_more_and_one_fewer_but_never_none(service: Service) -> None:
    for _ in range(3):
        service.signal(signal.SIGTTIN)
        time.sleep(0.02)  # two of the same that wait are one: signal(7)
    until(lambda: len(service.workers()) == 5)
    service.wait_for("5 of 5 workers are ready")
    for _ in range(10):
        service.signal(signal.SIGTTOU)
        time.sleep(0.02)
    until(lambda: len(service.workers()) == 1)
    assert service.ask("pid") == str(service.workers()[0])
    service.signal(signal.SIGHUP)
    service.wait_for("2 of 2 workers are ready", 2)  # as the configuration has it


# -- ending -----------------------------------------------------------------------------------------------------------


def test_sigterm_lets_what_has_begun_finish(service: Service) -> None:
    with Client(service.address) as one, Client(service.address) as two:
        for client in (one, two):
            client.ask(b"take 5\n")
        service.signal(signal.SIGTERM)
        service.wait_for("ending when (1 request is|2 requests are) done")
        for client in (one, two):
            assert client.ask(b"12345") == b"5\n"
            client.end()
        assert service.wait() == 0


def test_systemd_tells_every_process_and_nothing_is_cut() -> None:
    """systemd sends SIGTERM to all processes of a service (systemd.kill(5)), so each worker gets it twice."""
    with Service() as service:
        service.wait_for(READY)
        with Client(service.address) as client:
            worker = int(client.ask(b"take 5\n"))
            os.killpg(service.pid, signal.SIGTERM)
            service.wait_for("ending when 1 request is done")
            os.kill(worker, signal.SIGTERM)  # the supervisor's may have come with the other one
            assert client.ask(b"12345") == b"5\n"
            assert client.ask(b"pid\n") == b"%d\n" % worker
        assert service.wait() == 0


@pytest.mark.parametrize(
    ("number", "is_draining"), [(signal.SIGINT, False), (signal.SIGINT, True), (signal.SIGTERM, True)]
)
def test_at_once(service: Service, number: int, is_draining: bool) -> None:
    with Client(service.address) as client:
        client.ask(b"pid\nslowly 1000\n")
        if is_draining:
            service.signal(signal.SIGTERM)
            service.wait_for("ending when 1 request is done")
        service.signal(number)
        assert client.rest() == b""
        assert service.wait() == 0
        assert not any("killed" in line for line in service.lines)


def test_ctrl_c_is_quiet(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    with Service("--bind", f"unix://{path}") as service:
        service.wait_for(READY)
        workers = service.workers()
        assert path.exists()
        os.killpg(service.pid, signal.SIGINT)
        assert service.wait() == 0
        wait_gone(workers)
    assert [line for line in service.lines if "ready" not in line] == []
    assert not path.exists()


def test_who_does_not_end_in_time_is_killed(service: Service) -> None:
    with Client(service.address) as client:
        pid = int(client.ask(b"pid\n"))
        client.send(b"block 1000\n")
        service.wait_for("has held up everyone")
        service.signal(signal.SIGINT)
        service.wait_for(f"worker {pid} has not ended in time: killed")
        assert service.wait() == 0


# A program that gives its workers little time to end after their time to drain.
IMPATIENT = """
if __name__ == "__main__":
    import logging, reqtable
    from reqtable.run import known_worker

    known_worker.GRACE_S = 0.1
    logging.basicConfig(level=logging.DEBUG)
    reqtable.serve({"tcp://127.0.0.1:0": Ledger})
"""


def test_a_worker_drains_as_long_as_its_own_configuration_says(tmp_path: Path) -> None:
    served = {"command": [sys.executable, "app.py"], "environment": {"REQTABLE_CONFIG": "reqtable.toml"}}
    patient = "workers = 1\n[limits]\ndrain_timeout_s = 1000\n"
    with Program(tmp_path, LEDGER + IMPATIENT, config=patient, **served) as program, program.client() as client:
        client.send(b"nap 1\n")
        program.operator().rows_once(lambda rows: rows and rows[0]["state"] == "SLEEPING")
        program.configure("workers = 1\n[limits]\ndrain_timeout_s = 0.1\n")
        program.kill(program.pid, signal.SIGHUP)
        program.wait_for(READY, 2)
        program.kill(program.pid, signal.SIGTERM)
        assert answer_of(client.line()).rest == "awake"
        program.wait_exit(program.pid)
        assert "killed" not in program.log


def test_ending_in_the_midst_of_a_reload() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        with Service(workers=4) as service:
            service.wait_for(READY)
            service.reload()
            service.wait_for("the configuration was read again")
            service.signal(number)
            assert service.wait() == 0
            assert [line for line in service.lines if "WARNING" in line or "ERROR" in line] == []


def test_a_workers_children_have_the_handlers_that_the_program_had() -> None:
    with Service("--dispatch", "fork") as service:
        for number in (signal.SIGTERM, signal.SIGHUP):
            # our own action if it is SIG_IGN: programs started by `nohup`, or by `&` in a script, inherit that
            inherited = signal.SIG_IGN if signal.getsignal(number) is signal.SIG_IGN else signal.SIG_DFL
            assert service.ask(f"handler {number:d}") == f"{inherited:d}"
        service.signal(signal.SIGTERM)
        assert service.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_worker_is_told_before_it_has_its_handlers(number: int, tmp_path: Path) -> None:
    """This holds also if the signal was ignored before, as in a shell's background jobs: that drops pending signals."""
    (tmp_path / "early.py").write_text(
        "import os, signal\nfrom tests.teller import Teller\n"
        f"signal.signal({number:d}, signal.SIG_IGN)\n"
        f"os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), {number:d}))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with Service(handler=f"{tmp_path}/early.py:Teller", env=env) as service:
        service.wait_for(r"worker \d+ ended by itself after", 2)
        service.signal(number)
        assert service.wait() == 0
        assert not any("ERROR" in line for line in service.lines)


# -- where there can be none ------------------------------------------------------------------------------------------


def test_where_there_can_be_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[ConfigurationError] = []

    def serve() -> None:
        with pytest.raises(ConfigurationError) as error:
            reqtable.serve(reqtable.StateRequestHandler, "tcp://127.0.0.1:0", workers=2)
        refused.append(error.value)

    thread = threading.Thread(target=serve)
    thread.start()
    thread.join(WAIT_S)
    monkeypatch.delattr(os, "fork")
    serve()
    with pytest.raises(ConfigurationError, match="workers must be a whole number above 0, not 0"):
        Config(workers=0)
    assert [str(each) for each in refused] == [
        "workers = 2: call serve() in the main thread, where signals come",
        "workers = 2: this platform has no fork(): leave it out",
    ]


def test_a_program_has_workers_too(tmp_path: Path) -> None:
    program = (
        "import reqtable\nfrom tests.teller import Teller\n"
        "reqtable.serve(Teller, 'tcp://127.0.0.1:0', workers=2, on_listening=lambda names: print(*names, flush=True))\n"
        "print('ended')\n"
    )
    with Started([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = ("127.0.0.1", int(process.stdout.readline().rpartition(":")[2]))
        with Client(address) as client:
            pid = int(client.ask(b"pid\n"))
            assert pid != process.pid
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0
        assert process.stdout.read() == "ended\n", "once, by the supervisor"
    assert state_of(pid) == "X"


def test_the_configuration_is_shown_with_it(tmp_path: Path) -> None:
    path = tmp_path / "reqtable.toml"
    path.write_text("workers = 3\n")

    def shown(*arguments: str) -> Any:
        return re.findall(r"^workers +(\S+) +(\S+)$", run("config", *arguments).stdout, re.MULTILINE)

    assert shown() == [("-", "default")]
    assert shown("--config", str(path)) == [("3", f"{path}:1")]
    assert shown("--config", str(path), "--workers", "4") == [("4", "argument")]
