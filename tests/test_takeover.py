"""After `kill -9` of a worker, its successor continues the requests: no byte is lost, repeated or wrong."""

from __future__ import annotations

import os
import resource
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from reqtable.handover import sleeper
from tests.certificates import begin_tls, write_certificate
from tests.control import Operator
from tests.moving.points import KILLS, converse
from tests.service import WAIT_S, Service, children_of, is_sleeper, state_of, wait_gone
from tests.support import Client

pytestmark = pytest.mark.skipif(sleeper.why_not_here() is not None, reason="this system has no sleepers")

# Before the step is noted, it runs again. From there on it does not. Either way the client gets one answer.
POINTS = [
    "received",
    "page half open",
    "page open",
    "page not closed",
    "page closed",
    "not written",
    "torn",
    "written",
    "committed",
    "noted",
    "half sent",
    "sent",
]


@contextmanager
def service(*arguments: str, workers: int = 1, **options: Any) -> Iterator[Service]:
    handler = "tests/taken_over.py:TakenOver"
    with Service("--takeover", *arguments, workers=workers, handler=handler, **options) as found:
        found.wait_for("workers are ready")
        yield found


def worker_of(found: Service, but: int = 0) -> int:
    """Wait until there is exactly one worker, other than `but`, and return its number."""
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:
        others = [pid for pid in found.workers() if pid != but and not is_sleeper(pid)]
        if len(others) == 1:
            return others[0]
    raise AssertionError("\n".join(found.lines))


def kill_worker(found: Service) -> int:
    """Kill the worker, and wait until another has taken over."""
    before = len([text for text in found.lines if "took over" in text])
    worker = worker_of(found)
    os.kill(worker, signal.SIGKILL)
    found.wait_for("took over", before + 1)
    return worker


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("line", [b"add 3\n", b"echo this\n"])
def test_a_request_goes_on_wherever_its_worker_is_killed(point: str, line: bytes) -> None:
    with service() as found, Client(found.address) as client, Client(found.address) as other:
        assert client.ask(b"add 1\n") == b"1 1\n"
        assert client.ask(b"echo is simple\n") == b"echo is simple\n"
        other.send(b"add 7\nadd 8")
        assert other.line() == b"1 7\n"
        assert client.ask(b"kill %b\n" % point.encode()) == b"armed\n"
        client.send(line)
        if line.startswith(b"echo") and point in ("not written", "torn", "written", "committed"):
            assert client.line() == line  # nothing but the page is written
            line = b"add 3\n"
            client.send(line)
        if line.startswith(b"add") and point in ("page not closed", "page closed"):
            assert client.line() == b"2 1 3\n"
            assert client.ask(b"echo next\n") == b"echo next\n"
        else:
            assert client.line() == (line if line.startswith(b"echo") else b"2 1 3\n")
        found.wait_for("took over 2 requests")
        assert client.ask(b"attempt\n") == b"attempt 0, moved 1 times\n"
        assert other.ask(b"0\n") == b"2 7 80\n"


def is_cut_off(client: Client) -> bool:
    """Return whether the connection ends without another byte. With unread input, the kernel resets it."""
    try:
        return client.rest() == b""
    except ConnectionResetError:
        return True


def let_it_rest(found: Service) -> None:
    """Wait until the worker has come back from a call that sends: the client had the bytes before it did."""
    with Client(found.address) as client:
        assert client.ask(b"echo this\n") == b"echo this\n"


@pytest.mark.parametrize("point", ["received", "page open", "not written", "torn", "written", "committed", "noted"])
def test_a_request_over_a_unix_socket_goes_on(point: str, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with (
        service("--bind", f"unix://{path}") as found,
        Client(path, socket.AF_UNIX) as client,
        Client(path, socket.AF_UNIX) as other,
    ):
        assert client.ask(b"add 1\n") == b"1 1\n"
        other.send(b"add 7\nadd 8")
        assert other.line() == b"1 7\n"
        assert client.ask(b"kill %b\n" % point.encode()) == b"armed\n"
        if point in ("page open", "noted"):
            client.send(b"add 3\n")  # nothing can tell whether it was received, or the answer sent
            assert is_cut_off(client)
            found.wait_for(r"took over 1 request of .*; 1 not continued \(1 by a Unix socket in doubt\)")
        else:
            assert client.ask(b"add 3\n") == b"2 1 3\n"
            assert client.ask(b"attempt\n") == b"attempt 0, moved 1 times\n"
        assert other.ask(b"0\n") == b"2 7 80\n"
        let_it_rest(found)
        kill_worker(found)
        assert other.ask(b"add 1\n") == b"3 7 80 1\n"


def test_what_a_client_of_a_unix_socket_has_not_taken_yet_is_sent(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with service("--bind", f"unix://{path}") as found, Client(path, socket.AF_UNIX) as client:
        client.send(b"big 5000000\nadd 4\n")
        assert client.receive(1000) == b"x" * 1000
        let_it_rest(found)
        kill_worker(found)
        assert client.receive(1_000_000) == b"x" * 1_000_000
        let_it_rest(found)
        kill_worker(found)
        assert client.receive(3_999_001) == b"x" * 3_999_000 + b"\n"
        assert client.line() == b"1 4\n"


def test_a_journal_that_is_written_after_the_send_is_found_out() -> None:
    """The journal then knows less than the kernel. The connection is cut rather than given a wrong byte."""
    late = os.environ | {"REQTABLE_TEST_BUG": "journal after send"}
    with service(env=late) as found, Client(found.address) as client, Client(found.address) as other:
        assert client.ask(b"add 1\n") == b"1 1\n"
        assert other.ask(b"add 5\n") == b"1 5\n"
        assert client.ask(b"kill sent\n") == b"armed\n"
        assert client.ask(b"add 3\n") == b"2 1 3\n"
        assert client.rest() == b""
        assert other.ask(b"add 6\n") == b"2 5 6\n"
        found.wait_for("can't be continued: .*6 sent since its page was opened")
        found.wait_for(r"took over 1 request of .*; 1 not continued \(1 whose record can't be used\)")


@pytest.mark.parametrize("seed", range(5))
def test_a_worker_may_die_at_any_point(seed: int) -> None:
    assert converse(seed) == KILLS


@pytest.mark.parametrize("bug", ["journal after send", "input not kept", "totals not asked"])
def test_seeds_find_a_bug(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQTABLE_TEST_BUG", bug)

    def is_found(seed: int) -> bool:
        try:
            converse(seed)
        except (AssertionError, OSError):
            return True
        return False

    assert any(map(is_found, range(20)))


def test_a_connection_that_was_just_accepted_is_served() -> None:
    with service() as found, Client(found.address) as client:
        assert client.ask(b"kill accepted\n") == b"armed\n"
        with Client(found.address) as other:
            assert other.ask(b"add 5\n") == b"1 5\n"
        assert client.ask(b"add 6\n") == b"1 6\n"


@pytest.mark.parametrize("point", ["closed", "freed"])
def test_a_connection_that_was_being_closed_stays_closed(point: str) -> None:
    with service() as found, Client(found.address) as client, Client(found.address) as other:
        assert client.ask(b"kill %b\n" % point.encode()) == b"armed\n"
        assert other.ask(b"bye\n") == b"bye\n"
        other.end()
        assert other.rest() == b""
        found.wait_for("took over 1 request of")
        assert client.ask(b"add 6\n") == b"1 6\n"


def test_what_is_half_done_goes_on() -> None:
    """Half of an upload, a long answer that the client does not read yet, a sleep, and many lines at once."""
    with service() as found, ExitStack() as stack:
        upload, download, sleeping, many = (stack.enter_context(Client(found.address)) for _ in range(4))
        upload.send(b"take 3000\n" + b"\1" * 1000)
        download.send(b"big 9000000\nadd 4\n")
        assert sleeping.ask(b"sleep 1\n") == b"sleeping\n"
        kill_worker(found)
        many.send(b"".join(b"add %d\n" % number for number in range(500)))
        kill_worker(found)
        upload.send(b"\1" * 2000)
        assert upload.line() == b"1 3000\n"
        assert download.receive(9_000_001) == b"x" * 9_000_000 + b"\n"
        assert download.line() == b"1 4\n"
        assert sleeping.line() == b"1 0\n"
        for number in range(500):
            last = b" ".join(b"%d" % each for each in range(max(0, number - 3), number + 1))
            assert many.line() == b"%d %b\n" % (number + 1, last)


def test_a_client_that_has_ended_its_input_gets_its_answer() -> None:
    with service() as found, Client(found.address) as client, Client(found.address) as other:
        assert client.ask(b"kill received\n") == b"armed\n"
        other.send(b"add 1\nrest").end()
        assert other.rest() == b"1 1\npartial rest"
        assert client.ask(b"add 2\n") == b"1 2\n"


def test_rows_and_figures_say_what_was_taken_over(tmp_path: Path) -> None:
    control = str(tmp_path / "c.sock")
    with service("--control", control) as found, Client(found.address) as client, Client(found.address) as other:
        assert client.ask(b"add 1\n") == b"1 1\n"
        assert other.ask(b"add 2\n") == b"1 2\n"
        operator = Operator(control)
        ids = {row["id"] for row in operator.get("/v1/requests")}
        kill_worker(found)
        rows = operator.get("/v1/requests")
        assert {row["id"] for row in rows} == ids
        assert [row["moves"] for row in rows] == [1, 1]
        assert all(row["idle_s"] <= row["age_s"] for row in rows)
        assert b"reqtable_requests_taken_total 2" in operator.ask("/metrics")[1]


def test_a_connection_that_start_tls_has_encrypted_is_served_until_its_worker_dies(tmp_path: Path) -> None:
    cert = write_certificate(tmp_path).encode()
    with service() as found, Client(found.address) as plain, Client(found.address) as client:
        assert plain.ask(b"add 1\n") == b"1 1\n"
        assert client.ask(b"add 2\n") == b"1 2\n"
        assert client.ask(b"tls %b\n" % cert) == b"go\n"
        begin_tls(client)
        assert client.line() == b"2 2 0\n"
        assert client.ask(b"add 3\n") == b"3 2 0 3\n"
        assert plain.ask(b"add 4\n") == b"2 1 4\n"
        kill_worker(found)
        assert is_cut_off(client)
        assert plain.ask(b"add 5\n") == b"3 1 4 5\n"
        found.wait_for("took over 1 request of")
        found.wait_for(r"1 not continued \(1 without a record\)")


def test_a_step_that_crashes_runs_again_once() -> None:
    with service() as found, Client(found.address) as client, Client(found.address) as other:
        assert client.ask(b"crash-once\n") == b"attempt 1\n"
        assert other.ask(b"add 2\n") == b"1 2\n"
        client.send(b"crash\n")
        assert is_cut_off(client)
        assert other.ask(b"add 3\n") == b"2 2 3\n"
        found.wait_for(r": \w+ ended in state ask: 2 crashes have cut its step off")
        found.wait_for(r"took over 1 request of .*; 1 not continued \(1 that crashed too often\)")


def test_more_attempts_can_be_allowed(tmp_path: Path) -> None:
    (tmp_path / "reqtable.toml").write_text("takeover = true\ntakeover_attempts = 3\n")
    with service("--config", str(tmp_path / "reqtable.toml")) as found, Client(found.address) as client:
        client.send(b"crash\n")
        assert is_cut_off(client)
        found.wait_for("4 crashes have cut its step off")


def test_a_successor_that_dies_while_it_takes_over_has_a_successor() -> None:
    with service() as found, Client(found.address) as client:
        assert client.ask(b"add 1\n") == b"1 1\n"
        worker = kill_worker(found)
        for _ in range(3):
            worker = worker_of(found, but=worker)
            os.kill(worker, signal.SIGKILL)  # perhaps before it has the sockets, perhaps after
        assert client.ask(b"add 2\n") == b"2 1 2\n"


def test_forty_kills_of_workers_under_load() -> None:
    with service(workers=2) as found, ExitStack() as stack:
        clients = [stack.enter_context(Client(found.address)) for _ in range(100)]
        sent = [0] * len(clients)
        for _ in range(40):
            with Client(found.address) as asking:  # of either worker
                victim = int(asking.ask(b"pid\n"))
            for number, client in enumerate(clients):
                client.send(b"add %d\nadd" % number if sent[number] % 2 == 0 else b" %d\n" % number)
                sent[number] += 1
            os.kill(victim, signal.SIGKILL)
            for number, client in enumerate(clients):
                last = b" ".join([b"%d" % number] * min(sent[number], 4))
                assert client.line() == b"%d %b\n" % (sent[number], last)


def test_a_worker_that_ends_as_it_should_leaves_no_connection_open() -> None:
    with service() as found, Client(found.address) as client:
        assert client.ask(b"add 1\n") == b"1 1\n"
        before = children_of(found.pid)
        assert len(before) == 2
        found.signal(signal.SIGINT)
        assert client.rest() == b""
        assert found.wait() == 0
        wait_gone(before)


def test_a_worker_at_its_limit_of_descriptors_has_a_successor() -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 256))

    with service(preexec_fn=limit) as found, ExitStack() as stack:
        clients = [stack.enter_context(Client(found.address)) for _ in range(60)]
        found.wait_for("no more descriptors|Too many open files")
        served = [client.send(b"add 1\n") for client in clients[:30]]
        assert {client.line() for client in served} == {b"1 1\n"}
        kill_worker(found)
        for client in served:
            assert client.ask(b"add 2\n") == b"2 1 2\n"
        assert not [line for line in found.lines if "too many descriptors" in line]
        for client in served:
            client.close()
        last = clients[-1]
        assert last.ask(b"add 3\n") == b"1 3\n"  # it had to wait


def test_the_sleeper_ends_with_the_supervisor() -> None:
    with service() as found:
        processes = children_of(found.pid)
        os.kill(found.pid, signal.SIGKILL)
        wait_gone(processes)


def test_a_request_goes_on_after_a_hot_restart_and_a_crash() -> None:
    with service() as found, Client(found.address) as client, Client(found.address) as other:
        assert client.ask(b"add 1\n") == b"1 1\n"
        other.send(b"add 7\nadd 8")
        assert other.line() == b"1 7\n"
        found.signal(signal.SIGUSR2)
        moved = found.wait_for(r"2 requests moved to process (\d+)")
        try:
            assert client.ask(b"attempt\n") == b"attempt 0, moved 1 times\n"
            assert found.wait() == 0
            os.kill(int(client.ask(b"pid\n")), signal.SIGKILL)
            assert client.ask(b"add 2\n") == b"2 1 2\n"
            assert other.ask(b"0\n") == b"2 7 80\n"
            assert client.ask(b"attempt\n") == b"attempt 0, moved 2 times\n"
        finally:
            os.kill(int(moved[0][1]), signal.SIGINT)
            wait_gone([int(moved[0][1])])


def test_without_its_sleeper_a_worker_goes_on_and_is_replaced() -> None:
    with service() as found, Client(found.address) as client:
        assert client.ask(b"add 1\n") == b"1 1\n"
        (own,) = (pid for pid in found.workers() if is_sleeper(pid))
        os.kill(own, signal.SIGKILL)
        found.wait_for("its requests can't be taken over")
        assert client.ask(b"add 2\n") == b"2 1 2\n"
        client.send(b"crash\n")
        assert is_cut_off(client)
        found.wait_for("workers are ready", 2)
        assert state_of(own) == "X"
