"""The documents work: these tests run the README's Python blocks in order and its console blocks, and check links."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import reqtable
from examples.notes import Notes
from reqtable.run.binds import OPTIONS, parse_bind
from reqtable.run.worker import HANDLED
from reqtable.testing.faults import KINDS
from reqtable.wants import MISSING
from tests.support import WAIT_S, Client, served, wait_until

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def test_the_readmes_python_runs_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    serve = reqtable.serve
    served: list[bytes] = []

    def serve_a_while(handler: Any, bind: str) -> None:
        """Serve as the README says, but on a free port, with one client; then send the signal that the README names."""
        clients: list[threading.Thread] = []

        def on_listening(names: list[str]) -> None:
            host, _, port = names[0].removeprefix("tcp://").rpartition(":")

            def client() -> None:
                with Client((host, int(port))) as one:
                    served.append(one.ask(b"put 9\na new onecount\n"))
                signal.raise_signal(signal.SIGTERM)

            clients.append(threading.Thread(target=client))
            clients[0].start()

        serve(handler, re.sub(r":\d+$", ":0", bind), on_listening=on_listening)
        clients[0].join(WAIT_S)

    monkeypatch.setattr(reqtable, "serve", serve_a_while)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n".join(blocks("python")), "README.md", "exec"), {"__name__": "readme"})
    assert served == [b"3\n"]
    lines = printed.getvalue().splitlines()
    [promised] = re.findall(r"It prints `(.*)`", README)
    assert lines[0] == promised
    assert lines[1].split()[:3] == ["id", "st", "peer"]
    assert "exactly(n=100)" in lines[2]


@pytest.mark.parametrize("block", blocks("console"))
def test_the_readmes_commands_print_what_it_shows(block: str) -> None:
    command, _, output = block.removeprefix("$ ").partition("\n")
    words = shlex.split(command)
    assert words[0] == "reqtable"
    result = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S, check=True
    )
    assert result.stdout.rstrip() == output.rstrip()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_the_readme_names_every_want_and_policy() -> None:
    for want in (
        "line",
        "until",
        "exactly",
        "chunk",
        "rest",
        "datagram",
        "sleep",
        "flushed",
        "call",
        "nothing",
        "hand_off",
        "parsed",
        "connect",
        "either",
        "told",
        "disconnected",
        "end_output",
        "start_tls",
    ):
        assert f"`{want}`" in README
        assert callable(getattr(reqtable, want))
    for policy in reqtable.dispatch.policy_names():  # type: ignore[attr-defined]
        assert f'`"{policy}"`' in README


def test_what_make_run_says_to_type_works() -> None:
    """The commands need only Python: many machines lack nc, and its versions differ."""
    with served(Notes) as server:
        command = ["make", "-n", "run", f"PYTHON={sys.executable}", f"PORT={server.server_address[1]}"]
        recipe = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        prints = [line for line in recipe.partition("exec")[0].splitlines() if line.startswith(("echo", "printf"))]
        hint = subprocess.run(["sh"], input="\n".join(prints), capture_output=True, text=True).stdout
        [talk] = re.findall(rf"^    ({sys.executable} -c .*)$", hint, re.MULTILINE)
        done = subprocess.run(talk, shell=True, capture_output=True, text=True, timeout=WAIT_S)
        assert (done.stdout, done.stderr) == ("3\nrank 9\n", "")
        [connect] = re.findall(rf"^    ({sys.executable} -i -c .*)$", hint, re.MULTILINE)
        with subprocess.Popen(connect, shell=True, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            wait_until(server, lambda: len(server.table) == 1)
            process.communicate(timeout=WAIT_S)
    assert "it answers 3, then rank 9" in hint
    assert re.search(r"^    \S+/bin/reqtable ps$", hint, re.MULTILINE)


def test_serve_needs_a_bind() -> None:
    with pytest.raises(reqtable.ConfigurationError, match="at least one bind"):
        reqtable.serve(reqtable.StreamRequestHandler)


def test_serve_leaves_signals_and_sockets_as_they_were() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        binds = ["tcp://127.0.0.1:0", f"tcp://127.0.0.1:{taken.getsockname()[1]}"]
        with pytest.raises(OSError, match="address already in use"):
            reqtable.serve(reqtable.StreamRequestHandler, *binds)
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_configuration_that_is_shown_can_be_loaded(tmp_path: Path) -> None:
    [shown] = re.findall(
        r"^```toml\n(.*?)^```", (ROOT / "docs" / "how-to" / "choose-a-policy.md").read_text(), re.DOTALL | re.MULTILINE
    )
    path = tmp_path / "reqtable.toml"
    path.write_text(shown)
    config = reqtable.Config.load(path)
    assert len(config.origins) == shown.count(" = ") - shown.count("{ "), "each key of it was read"
    with reqtable.TCPServer(("127.0.0.1", 0), Notes, config=config) as server:
        assert server._policies.chosen.name == "pool"


def test_every_policy_has_its_line_in_the_table() -> None:
    page = (ROOT / "docs" / "how-to" / "choose-a-policy.md").read_text()
    for policy in reqtable.dispatch.policy_names():  # type: ignore[attr-defined]
        assert re.search(rf"^\| `{policy}` \| [^|]+ \| [^|]+ \| [^|]+ \|$", page, re.MULTILINE), policy


def test_the_page_on_testing_runs_as_it_stands() -> None:
    page = (ROOT / "docs" / "how-to" / "test-a-handler.md").read_text()
    shown = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    assert len(shown) >= 5
    exec(compile("\n".join(shown), "how-to/test-a-handler.md", "exec"), {"__name__": "testing"})


def test_the_page_on_extending_runs_as_it_stands() -> None:
    page = (ROOT / "docs" / "how-to" / "extend.md").read_text()
    shown = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    assert len(shown) == 3
    made: dict[str, Any] = {"__name__": __name__}
    exec(compile("\n".join(shown), "extending.md", "exec"), made)
    first = made["FastFrame"]().first
    assert (first(b"\0\2hi!"), first(b"\0\2h"), first(b"\0")) == ((b"hi", 4), MISSING, None)
    flags = {name for name, value in vars(reqtable.dispatch.Policy).items() if isinstance(value, bool)}  # type: ignore[attr-defined]
    assert {name for name in flags if f"`{name}`" not in page} == set()


def test_the_page_on_testing_names_every_fault() -> None:
    page = (ROOT / "docs" / "how-to" / "test-a-handler.md").read_text()
    assert [kind for kind in KINDS if f"`{kind}`" not in page] == []


# -- moving from elsewhere --------------------------------------------------------------------------------------------


def shown(document: str, label: str) -> str:
    """Return the only program that the document shows under that label."""
    page = (ROOT / "docs" / document).read_text()
    (program,) = re.findall(rf"^```python {label}\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    return program


@contextlib.contextmanager
def running(program: str, folder: Path) -> Iterator[Any]:
    """Run a program that prints its port, connect a silent client, and yield the program's address."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert process.stdout is not None
        address = ("127.0.0.1", int(process.stdout.readline()))
        with Client(address):
            yield address
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("label", ["before", "after"])
def test_moving_from_socketserver(label: str, tmp_path: Path) -> None:
    with running(shown("how-to/move-from-socketserver.md", label), tmp_path) as address, Client(address) as client:
        assert client.ask(b"one\n") == b"ONE\n"
        assert client.send(b"two\nthree\n").end().rest() == b"TWO\nTHREE\n"


def test_moving_an_http_server(tmp_path: Path) -> None:
    (tmp_path / "page").write_bytes(b"found")
    with running(shown("how-to/move-from-socketserver.md", "mixin"), tmp_path) as address, Client(address) as client:
        assert client.send(b"GET /page HTTP/1.0\r\n\r\n").rest().endswith(b"\r\n\r\nfound")


@pytest.mark.parametrize("label", ["before", "after"])
def test_moving_from_asyncore(label: str, tmp_path: Path) -> None:
    if label == "before" and sys.version_info >= (3, 12):
        pytest.skip("asyncore and asynchat are not in this Python's standard library")
    with running(shown("how-to/move-from-asyncore.md", label), tmp_path) as address, Client(address) as client:
        assert client.send(b"put 7\none two").ask(b"count\n") == b"2\n"
        assert client.send(b"put 5\nthree").ask(b"count\n") == b"3\n"
        assert client.end().rest() == b""


def test_the_hooks_and_the_timer_on_the_page_on_operating(tmp_path: Path) -> None:
    with running(shown("how-to/operate.md", "hooks"), tmp_path) as address, Client(address) as client:
        client.send(b"5\n7\n6\n")
        assert client.line() in (b"0\n", b"7\n")
        while client.line() != b"7\n":
            pass


def test_the_page_on_operating_names_every_limit_and_no_other() -> None:
    page = (ROOT / "docs" / "how-to" / "operate.md").read_text()
    of_the_loop = {
        "accepts_per_pass",
        "expiries_per_pass",
        "steps_per_pass",
        "recv_bytes",
        "send_bytes",
        "pass_bytes",
        "inbox_max",
        "calls_max",
    }
    of_the_loop |= {"loop_stall_s", "accept_pause_s"}
    names = {field.name for field in fields(reqtable.Limits)}
    assert names - of_the_loop == {name for name in re.findall(r"`(\w+)`", page) if name in names}
    for name, default in re.findall(r"^\| `(\w+)` \| ([\d,.]+)(?: s)? \|", page, flags=re.MULTILINE):
        assert getattr(reqtable.Limits(), name) == float(default.replace(",", ""))


def test_the_page_on_operating_explains_every_letter_of_a_state() -> None:
    page = (ROOT / "docs" / "how-to" / "operate.md").read_text()
    shown = re.findall(r"^\| ([A-Z]) \| ([A-Z]+) \|", page, flags=re.MULTILINE)
    assert shown == [(state.value, state.name) for state in reqtable.State if state is not reqtable.State.CLOSED]


def test_the_page_on_operating_names_every_figure() -> None:
    page = (
        (ROOT / "docs" / "how-to" / "operate.md").read_text().partition("**Figures.**")[2].partition("**The log.**")[0]
    )
    with reqtable.TCPServer(("127.0.0.1", 0), Notes) as server:
        assert [name for name in server.stats() if f"`{name}`" not in page] == []
        assert " ".join(server.stats()["finished"]) in page


def test_the_page_on_deploying_names_every_bind_option_and_signal_and_no_other() -> None:
    page = (ROOT / "docs" / "how-to" / "deploy.md").read_text()
    shown = [parse_bind(text) for text in re.findall(r"`(\w+://[^`…]+)`", page)]
    assert {bind.scheme for bind in shown} == set(OPTIONS)
    assert {name for bind in shown for name in bind.options} == {name for names in OPTIONS.values() for name in names}
    table = page.partition("## Signals")[2].partition("##")[0]
    named = set(re.findall(r"^\| (SIG\w+)(?:, (SIG\w+))? \|", table, flags=re.MULTILINE))
    assert {name for pair in named for name in pair if name} == {signal.Signals(number).name for number in HANDLED}


# -- docs/how-to/reach-out.md -----------------------------------------------------------------------------------------


def reaching_out() -> dict[str, Any]:
    """Run the page's blocks, and return what they define."""
    page = (ROOT / "docs" / "how-to" / "reach-out.md").read_text()
    found: dict[str, Any] = {"__name__": "reaching_out"}
    for block in re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE):
        exec(compile(block, "docs/how-to/reach-out.md", "exec"), found)
    return found


@pytest.mark.parametrize("name", ["Ask", "Forward", "AskByStates"])
def test_the_handlers_that_ask_another_server(name: str) -> None:
    class Echo(reqtable.AsyncRequestHandler):
        async def handle(self) -> None:
            while data := await self.read(reqtable.chunk()):
                await self.send(data)

    handler = reaching_out()[name]
    with served(Echo) as upstream:
        handler.target = f"tcp://127.0.0.1:{upstream.server_address[1]}"
        with served(handler) as server, Client(server.server_address) as client:
            assert client.ask(b"hello\n") == b"hello\n"
            assert client.end().rest() == b""
            wait_until(server, lambda: not len(server.table))
            assert server.stats()["finished"]["done"] == 1


def test_the_state_machine_whose_other_server_is_missing() -> None:
    handler = reaching_out()["AskByStates"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        handler.target = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        with served(handler) as server, Client(server.server_address) as client:
            assert client.rest() == b"the other server does not answer\n"


def test_the_chat_and_the_poll() -> None:
    found = reaching_out()
    with served(found["Chat"]) as server, Client(server.server_address) as one, Client(server.server_address) as two:
        wait_until(server, lambda: len(found["Chat"].here) == 2)
        one.send(b"hello\n")
        assert two.line() == b"hello\n"
        two.send(b"hi\n")
        assert one.line() == b"hi\n"
    polls = found["Poll"].polls
    with served(found["Poll"]) as server, Client(server.server_address) as one, Client(server.server_address) as two:
        one.send(b"poll\n")
        wait_until(server, lambda: len(polls) == 1)
        two.send(b"poll\nunread\n")
        wait_until(server, lambda: len(polls) == 2)
        polls[0].tell(b"news\n")
        assert one.line() == b"news\n"
        assert two.end().rest() == b""


# -- docs/how-to/deploy-without-a-cut.md ------------------------------------------------------------------------------


def test_the_page_on_moving_moves_a_request() -> None:
    part = (
        (ROOT / "docs" / "how-to" / "deploy-without-a-cut.md")
        .read_text()
        .partition("## Changing the code")[2]
        .partition("## Options")[0]
    )
    for block in re.findall(r"^```python\n(.*?)^```", part, flags=re.DOTALL | re.MULTILINE):
        found: dict[str, Any] = {"__name__": "moving"}
        try:
            exec(compile(block, "docs/how-to/deploy-without-a-cut.md", "exec"), found)
        finally:
            for name in ("first", "second"):
                if name in found:
                    found[name].shutdown()
                    found[name].server_close()
            if "client" in found:
                found["client"].close()
    assert found["ids"] == [1]
