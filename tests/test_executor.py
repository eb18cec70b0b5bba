"""Policy `executor`: steps are shipped as data to processes, to loky, to a Dask cluster; some can't be shipped."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import reqtable
from reqtable import Config, ConfigurationError, Transition, line, state
from reqtable.config import ExecutorOptions
from reqtable.http import wsgi_handler
from tests import shipped
from tests.http_client import Asking, files_of
from tests.shipped import Recoverer, Shipped
from tests.support import WAIT_S, Client, Started, serving, wait_until

ANY = ("127.0.0.1", 0)
ROOT = Path(__file__).parent.parent


@contextlib.contextmanager
def shipping(handler: Any = Shipped, options: ExecutorOptions | None = None) -> Iterator[Any]:
    config = Config(executor=options or ExecutorOptions(arguments={"max_workers": 1}))
    with serving(reqtable.TCPServer(ANY, handler, dispatch="executor", config=config)) as server:
        yield server
        wait_until(server, lambda: len(server.table) == 0)


def test_steps_run_in_another_process_and_the_fields_come_back() -> None:
    with shipping() as server, Client(server.server_address) as client:
        pid, count = map(int, client.ask(b"where\n").split())
        assert (pid != os.getpid(), count) == (True, 1)
        assert client.ask(b"where\n").split() == [b"%d" % pid, b"2"]
        assert client.ask(b"count a b a\n") == b"{b'a': 2, b'b': 1}\n"
        assert client.ask(b"count b\n") == b"{b'a': 2, b'b': 2}\n", "a dataclass travels both ways"
        assert client.ask(b"body 5\n12345") == b"5 bytes\n"
        assert client.ask(b"call\n") == b"called in %d\n" % os.getpid(), "a call runs where the table is"
        assert client.ask(b"soon\n") == b"too slow in %d\n" % pid
        assert client.ask(b"peer\n") == b"127.0.0.1\n"
        [entry] = server.table
        assert (entry.handler.count, entry.handler.state_name) == (8, "command"), "the table's copy is up to date"
        client.end()
        assert client.rest() == b"bye after 8\n"


def test_http_requests_are_answered_in_another_process() -> None:
    config = Config(executor=ExecutorOptions(arguments={"max_workers": 1}))
    with serving(reqtable.TCPServer(ANY, shipped.Web, dispatch="executor", config=config)) as server:
        with Asking(server.server_address) as client:
            assert int(client.get("/").body) != os.getpid()
            client.send(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
            assert client.answer().body == b"abc"
            assert client.get("/", "PATCH").status == 405
            client.send(b"PUT /slow HTTP/1.1\r\nHost: x\r\n\r\n")
            [entry] = server.table
            wait_until(server, lambda: entry.handler.state_name == "waits")
            assert entry.began_at == pytest.approx(entry.handler.request.began_at), "for request_timeout_s"
            [row] = server.table.snapshot()
            assert (row["method"], row["path"]) == ("PUT", "/slow")
            draining = threading.Thread(target=server.drain, args=(WAIT_S,))
            draining.start()
            wait_until(server, lambda: server._is_draining)
            entry.handler.tell("done")
            last = client.answer()
            assert (last.body, last.fields["connection"]) == (b"done", "close")
            client.close()
            draining.join(WAIT_S)


def test_an_http_request_that_fails_in_another_process_is_answered_by_500() -> None:
    with shipping(shipped.Web) as server, Asking(server.server_address) as client:
        assert client.get("/x", "DELETE").status == 500
        assert client.rest() == b""


@pytest.mark.parametrize(
    ("command", "answer", "said"),
    [
        (b"fail\n", b"so far\n", "LookupError: as asked"),
        (b"exit\n", b"", r"a step raised SystemExit\(3\)"),
        (b"undeclared\n", b"", r"Shipped\.extra is not a declared field, and would be lost: annotate it"),
        (b"lock\n", b"", r"Shipped\.command left fields or returned a want that can't be pickled"),
        (b"closure\n", b"", r"Shipped\.called left fields or returned a want that can't be pickled"),
        (b"server\n", b"", r"self\.server\.table: this step runs in another process than its server"),
    ],
)
def test_what_goes_wrong_over_there_fails_its_request_alone(
    command: bytes, answer: bytes, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    import re

    with shipping() as server, Client(server.server_address) as other:
        assert other.ask(b"where\n").endswith(b" 1\n")
        with Client(server.server_address) as client:
            assert client.send(command).rest() == answer
        assert re.search(said, caplog.text), caplog.text
        assert other.ask(b"where\n").endswith(b" 2\n")


def test_on_error_runs_over_there() -> None:
    with shipping(Recoverer) as server, Client(server.server_address) as client:
        assert client.ask(b"fail\n") == b"so far\n"
        assert client.line() == b"recovered from as asked\n"
        assert client.ask(b"where\n").endswith(b" 2\n"), "what was counted before the error is kept"


def test_too_long_a_line_reaches_on_limit() -> None:
    with shipping() as server, Client(server.server_address) as client:
        client.send(b"x" * 2000)
        assert client.rest() == b"too long\n"


def test_a_worker_that_dies_fails_its_request_and_the_pool_is_rebuilt(caplog: pytest.LogCaptureFixture) -> None:
    with shipping() as server, Client(server.server_address) as other:
        first = other.ask(b"where\n").split()[0]
        for _ in range(3):
            with Client(server.server_address) as client:
                assert client.send(b"die\n").rest() == b""
            assert other.ask(b"where\n").split()[0] != first
        assert ": the worker that ran Shipped.command failed: BrokenProcessPool" in caplog.text
        assert caplog.text.count("a new one is made") == 3


def test_a_cancelled_step_leaves_nothing() -> None:
    with shipping() as server:
        with Client(server.server_address) as client:
            client.ask(b"where\n")
            client.send(b"where\n")
            server.table.cancel(server.table.snapshot()[0]["id"])
            client.rest()
        with Client(server.server_address) as client:
            assert client.ask(b"where\n").endswith(b" 1\n")


# -- executors of other kinds -----------------------------------------------------------------------------------------


def test_threads_from_a_factory() -> None:
    options = ExecutorOptions("tests.shipped:threads", {"max_workers": 2, "thread_name_prefix": "reqtable-call"})
    with shipping(options=options) as server, Client(server.server_address) as client:
        assert client.ask(b"where\n") == b"%d 1\n" % os.getpid()
        assert client.ask(b"count a\n") == b"{b'a': 1}\n"


OTHERS = """
import os, socket, sys, threading
sys.path[:0] = [{root!r}]

def main():
    import reqtable
    from reqtable import Config
    from reqtable.config import ExecutorOptions
    from tests.support import Client, serving
    from tests.shipped import Shipped
    {setup}
    config = Config(executor=ExecutorOptions({factory!r}, {arguments}))
    server = reqtable.TCPServer(("127.0.0.1", 0), Shipped, dispatch="executor", config=config)
    with serving(server), Client(server.server_address) as client:
        pid, count = client.ask(b"where\\n").split()
        assert int(pid) != os.getpid(), "it runs over there"
        assert client.ask(b"count a b a\\n") == b"{{b'a': 2, b'b': 1}}\\n"
        with Client(server.server_address) as other:
            assert other.send(b"fail\\n").rest() == b"so far\\n"
        if {kills}:
            with Client(server.server_address) as other:
                assert other.send(b"die\\n").rest() == b""
        pid, count = client.ask(b"where\\n").split()
        assert (int(pid) != os.getpid(), count) == (True, b"3")
        print("served", flush=True)
    {teardown}

if __name__ == "__main__":
    main()
"""


def run_with(tmp_path: Path, **parts: Any) -> None:
    """Run the test in a new process, because these libraries leave threads and processes behind."""
    script = tmp_path / "other.py"
    defaults = {"root": str(ROOT), "setup": "pass", "teardown": "pass", "arguments": {}, "kills": True}
    script.write_text(OTHERS.format(**{**defaults, **parts}))
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=50, cwd=tmp_path)
    assert result.stdout.startswith("served"), result.stdout + result.stderr


@pytest.mark.timeout(60)
def test_loky(tmp_path: Path) -> None:
    pytest.importorskip("loky")
    run_with(tmp_path, factory="loky:get_reusable_executor", arguments={"max_workers": 1})


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_dask_cluster(tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    setup = (
        "from distributed import LocalCluster\n"
        "    cluster = LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None,\n"
        "                           host='127.0.0.1')\n"
        "    address = cluster.scheduler_address"
    )
    # a scheduler repeats a task that killed its worker on the other workers, so this test kills no worker
    run_with(
        tmp_path,
        setup=setup,
        factory="tests.shipped:dask",
        arguments="{'address': address}",
        kills=False,
        teardown="cluster.close()",
    )


FILE = """
from dataclasses import dataclass, field
import os, reqtable
from reqtable import line, state

@dataclass
class Seen:
    lines: list = field(default_factory=list)

class Served(reqtable.StateRequestHandler):
    seen: Seen = Seen()

    @state(line())
    def command(self, text):
        self.seen.lines.append(text)
        self.send(b"%d %d\\n" % (os.getpid(), len(self.seen.lines)))
        return self.command
"""


@pytest.mark.parametrize("dispatch", ["executor", "inline"])
def test_a_handler_that_is_served_from_a_file_ships_too(dispatch: str, tmp_path: Path) -> None:
    """Other classes in the handler's file can be shipped too: the worker loads the file before it unpickles."""
    path = tmp_path / "served_from_a_file.py"
    path.write_text(FILE)
    command = [sys.executable, "-m", "reqtable", "serve", f"{path}:Served", "--bind", "tcp://127.0.0.1:0"]
    with Started([*command, "--dispatch", dispatch], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().rpartition(":")[2])
        try:
            with Client(("127.0.0.1", port)) as client:
                pid, _ = client.ask(b"one\n").split()
                assert (int(pid) != process.pid) == (dispatch == "executor")
                assert client.ask(b"two\n").split() == [pid, b"2"]
        finally:
            process.terminate()
        assert process.wait(WAIT_S) == 0


# -- what is refused, before anything is bound ------------------------------------------------------------------------


class Elsewhere(reqtable.AsyncRequestHandler):
    async def handle(self) -> None:
        pass


def local_class() -> type:
    class Local(reqtable.StateRequestHandler):
        @state(line())
        def command(self, text: bytes) -> Transition:
            return None

    return Local


@pytest.mark.parametrize(
    ("handler", "why"),
    [
        (Elsewhere, "Elsewhere can't run under policy 'executor', which ships steps as data: only a StateRequestH"),
        (reqtable.StreamRequestHandler, "only a StateRequestHandler is data"),
        (local_class(), "Local can't be shipped to another process, which finds it by its name: define it at the top"),
        (
            files_of(ROOT),
            "Files can't run under policy 'executor', which ships steps as data: it holds what is no",
        ),
        (wsgi_handler(print), "it holds what is no data (when its application is running): choose 'inline',"),
        (shipped.WithFunction, "WithFunction can't run under policy 'executor': its field 'key' can't be pickled"),
    ],
)
def test_a_handler_that_can_not_be_shipped_is_refused(handler: Any, why: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        reqtable.TCPServer(ANY, handler, dispatch="executor")
    assert why in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("factory", "arguments", "why"),
    [
        ("no_such_module:made", {}, "factory 'no_such_module:made': ModuleNotFoundError: No module named"),
        ("tests.shipped:no_such_factory", {}, "AttributeError: module 'tests.shipped' has no attribute"),
        (
            "tests.shipped:nothing",
            {},
            "tests.shipped:nothing' returned None, not a concurrent.futures.Executor",
        ),
        (
            "tests.shipped:broken",
            {},
            f"factory 'tests.shipped:broken': RuntimeError: no such cluster, in broken ({shipped.__file__}:",
        ),
        ("tests.shipped:threads", {"max_workers": 0}, "max_workers must be greater than 0"),
        (None, {"max_workers": 0}, "the pool of processes: ValueError: max_workers must be greater than 0"),
    ],
)
@pytest.mark.parametrize("key", ["executor", "executors"])
def test_a_factory_that_makes_no_executor_is_refused(
    key: str, factory: str | None, arguments: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reqtable.TCPServer, "server_bind", lambda _: pytest.fail("it was bound"))
    options: Any = ExecutorOptions(factory, arguments)
    config = Config(**{key: {"mine": options} if key == "executors" else options})
    with pytest.raises(ConfigurationError) as raised:
        reqtable.TCPServer(ANY, Shipped, dispatch="executor", config=config)
    assert why in str(raised.value)
    assert "\n" not in str(raised.value)
    gc.collect()
    assert threading.active_count() <= 2


def test_a_factory_is_written_as_module_and_name() -> None:
    for wrong in ("concurrent.futures", ":made", "module:"):
        with pytest.raises(ConfigurationError, match="write it as module:callable"):
            ExecutorOptions(wrong)


# -- regressions ------------------------------------------------------------------------------------------------------


def test_on_close_runs_over_there_when_the_server_closes(tmp_path: Path) -> None:
    """This holds for a waiting request and for a request whose step is out. No pool is left running afterwards."""
    config = Config(executor=ExecutorOptions(arguments={"max_workers": 1}))
    before = threading.active_count()
    server = reqtable.TCPServer(ANY, shipped.Closing, dispatch="executor", config=config)
    loop = threading.Thread(target=server.serve_forever)
    loop.start()
    waiting, busy = Client(server.server_address), Client(server.server_address)
    assert waiting.ask(b"%s\n" % bytes(tmp_path / "waiting")) == b"ok\n"
    assert busy.ask(b"%s\n" % bytes(tmp_path / "busy")) == b"ok\n"
    busy.send(b"slow\n")
    wait_until(server, lambda: any(entry.state is reqtable.State.OFFLOADED for entry in server.table))
    server.shutdown()
    loop.join(WAIT_S)
    server.server_close()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["busy", "waiting"]
    assert threading.active_count() == before
    waiting.close()
    busy.close()


@pytest.mark.parametrize("handler", [shipped.Awkward])
def test_an_error_that_does_not_unpickle_is_said_in_words(handler: Any, caplog: pytest.LogCaptureFixture) -> None:
    with shipping(handler) as server:
        with Client(server.server_address) as client:
            assert client.send(b"raise\n").rest() == b""
        assert "HandlerError: TwoArguments: first" in caplog.text
        with Client(server.server_address) as client:
            assert client.ask(b"call\n") == b"HandlerError: TwoArguments: first\n"
            assert client.ask(b"call\n") == b"HandlerError: TwoArguments: first\n"
    assert "a new one is made" not in caplog.text, "the pool lives"


def test_a_shared_executor_that_someone_shuts_down_is_made_anew() -> None:
    options = ExecutorOptions("tests.shipped:shared")
    with shipping(options=options) as one, Client(one.server_address) as client:
        assert client.ask(b"where\n").endswith(b" 1\n")
        with shipping(options=options) as other, Client(other.server_address) as second:
            assert second.ask(b"where\n").endswith(b" 1\n")
        assert client.ask(b"where\n").endswith(b" 2\n")


def test_a_factory_that_exits_or_says_much_is_one_line() -> None:
    for factory in ("tests.shipped:exits", "tests.shipped:verbose"):
        with pytest.raises(ConfigurationError) as raised:
            reqtable.TCPServer(ANY, Shipped, dispatch="executor", config=Config(executor=ExecutorOptions(factory)))
        assert "\n" not in str(raised.value)


def test_what_a_state_on_the_loop_keeps_undeclared_is_not_lost_silently(caplog: pytest.LogCaptureFixture) -> None:
    with shipping(shipped.OnTheLoop) as server, Client(server.server_address) as client:
        client.send(b"\n")
        assert client.rest() == b""
        assert "OnTheLoop.extra is not a declared field" in caplog.text


def test_a_field_that_is_deleted_is_gone() -> None:
    with shipping(shipped.Deletes) as server, Client(server.server_address) as client:
        assert client.ask(b"\n") == b"there\n"
        assert client.ask(b"\n") == b"gone\n"
        assert client.ask(b"\n") == b"gone\n"


def test_a_worker_does_not_outlive_a_server_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "served_and_killed.py"
    path.write_text(FILE)
    command = [sys.executable, "-m", "reqtable", "serve", f"{path}:Served", "--bind", "tcp://127.0.0.1:0"]
    with Started([*command, "--dispatch", "executor"], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().rpartition(":")[2])
        with Client(("127.0.0.1", port)) as client:
            worker = os.pidfd_open(int(client.ask(b"one\n").split()[0]))
            process.kill()
            assert select.select([worker], [], [], WAIT_S)[0], "it waits for work that will never come"
            os.close(worker)
