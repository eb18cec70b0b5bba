"""Links of the documents lead somewhere, and what single pages show does what they say. (`test_pages.py` runs all.)"""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import reqtable
from examples.notes import Notes
from reqtable.run.binds import OPTIONS, parse_bind
from reqtable.run.worker import HANDLED
from reqtable.testing.faults import KINDS
from reqtable.wants import MISSING
from tests.pages import importing, played, running, text_of, titled, write_files
from tests.support import WAIT_S, Client, served, wait_until

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_what_make_run_says_to_type_works() -> None:
    with served(Notes) as server:
        command = ["make", "-n", "run", f"PYTHON={sys.executable}", f"PORT={server.server_address[1]}"]
        recipe = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        prints = [line for line in recipe.partition("exec")[0].splitlines() if line.startswith(("echo", "printf"))]
        hint = subprocess.run(["sh"], input="\n".join(prints), capture_output=True, text=True).stdout
        [words] = re.findall(r"^    \S+/bin/reqtable (talk .*)$", hint, re.MULTILINE)
        [typed] = re.findall(r"Type (.*?), (.*?), (.*?), then (.*?);", hint)
        talk = [sys.executable, "-m", "reqtable", *words.split()]
        lines = "".join(f"{line}\n" for line in typed)
        done = subprocess.run(talk, cwd=ROOT, input=lines, capture_output=True, text=True, timeout=WAIT_S)
        assert (done.stdout, done.stderr) == ("3\nrank 9\n", "")
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


def test_every_policy_has_its_line_in_the_table() -> None:
    page = text_of("docs/how-to/choose-a-policy.md")
    for policy in reqtable.dispatch.policy_names():
        assert re.search(rf"^\| `{policy}` \| [^|]+ \| [^|]+ \| [^|]+ \|$", page, re.MULTILINE), policy


def test_the_page_on_testing_names_every_fault() -> None:
    page = text_of("docs/how-to/inject-faults.md")
    assert [kind for kind in KINDS if f"`{kind}`" not in page] == []


# -- moving from elsewhere --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["before", "after"])
def test_moving_from_socketserver(label: str, tmp_path: Path) -> None:
    with (
        running("docs/how-to/move-from-socketserver.md", f"{label}.py", tmp_path) as address,
        Client(address) as client,
    ):
        assert client.ask(b"one\n") == b"ONE\n"
        assert client.send(b"two\nthree\n").end().rest() == b"TWO\nTHREE\n"


def test_moving_an_http_server(tmp_path: Path) -> None:
    (tmp_path / "page").write_bytes(b"found")
    with running("docs/how-to/move-from-socketserver.md", "mixin.py", tmp_path) as address, Client(address) as client:
        assert client.send(b"GET /page HTTP/1.0\r\n\r\n").rest().endswith(b"\r\n\r\nfound")


@pytest.mark.parametrize("label", ["before", "after"])
def test_moving_from_asyncore(label: str, tmp_path: Path) -> None:
    if label == "before" and sys.version_info >= (3, 12):
        pytest.skip("asyncore and asynchat are not in this Python's standard library")
    with running("docs/how-to/move-from-asyncore.md", f"{label}.py", tmp_path) as address, Client(address) as client:
        assert client.send(b"put 7\none two").ask(b"count\n") == b"2\n"
        assert client.send(b"put 5\nthree").ask(b"count\n") == b"3\n"
        assert client.end().rest() == b""


def test_the_hooks_and_the_timer_of_the_auction(tmp_path: Path) -> None:
    with (
        running("docs/how-to/do-work-at-start-and-end.md", "auction.py", tmp_path) as address,
        Client(address) as client,
    ):
        client.send(b"5\n7\n6\n")
        assert client.line() in (b"0\n", b"7\n")
        while client.line() != b"7\n":
            pass


def test_a_page_names_every_figure() -> None:
    page = text_of("docs/how-to/read-the-figures.md")
    with reqtable.TCPServer(("127.0.0.1", 0), Notes) as server:
        assert [name for name in server.stats() if f"`{name}`" not in page] == []
        assert " ".join(server.stats()["finished"]) in page


def test_a_page_names_every_option_of_binds_and_no_other() -> None:
    page = text_of("docs/how-to/listen-at-an-address.md")
    shown = [parse_bind(text) for text in re.findall(r"`(\w+://[^`…]+)`", page)]
    assert {bind.scheme for bind in shown} == set(OPTIONS)
    assert {name for bind in shown for name in bind.options} == {name for names in OPTIONS.values() for name in names}


def test_a_page_names_every_signal_and_no_other() -> None:
    page = text_of("docs/how-to/send-signals.md")
    named = set(re.findall(r"^\| (SIG\w+)(?:, (SIG\w+))? \|", page, flags=re.MULTILINE))
    assert {name for pair in named for name in pair if name} == {signal.Signals(number).name for number in HANDLED}


def test_the_page_on_wants_runs_and_the_one_on_policies_names_every_flag(tmp_path: Path) -> None:
    with played("docs/how-to/write-a-want.md", tmp_path) as names:
        first = names["FastFrame"]().first
        assert (first(b"\0\2hi!"), first(b"\0\2h"), first(b"\0")) == ((b"hi", 4), MISSING, None)
    page = text_of("docs/how-to/write-a-policy.md")
    flags = {name for name, value in vars(reqtable.dispatch.Policy).items() if isinstance(value, bool)}
    assert {name for name in flags if f"`{name}`" not in page} == set()


def test_the_policy_of_the_page_runs(tmp_path: Path) -> None:
    page = "docs/how-to/write-a-policy.md"
    ((name, place),) = tomllib.loads(titled(page, "pyproject.toml"))["project"]["entry-points"][
        "reqtable.dispatch"
    ].items()
    write_files(page, tmp_path)
    information = tmp_path / "stopwatch-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: stopwatch\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[reqtable.dispatch]\n{name} = {place}\n")
    with importing(tmp_path), served(Notes, dispatch=name) as server, Client(server.server_address) as client:
        assert client.ask(b"count\n") == b"0\n"
        assert len(server._policies.chosen.times) >= 1


def test_the_request_of_the_page_moves_and_keeps_its_id(tmp_path: Path) -> None:
    with played("docs/how-to/save-a-request.md", tmp_path) as names:
        assert names["ids"] == [1]


# -- more than one peer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "name"),
    [("talk-to-another-service", "Ask"), ("talk-to-another-service", "AskByStates"), ("proxy-bytes", "Forward")],
)
def test_the_handlers_that_ask_another_server(page: str, name: str, tmp_path: Path) -> None:
    class Echo(reqtable.AsyncRequestHandler):
        async def handle(self) -> None:
            while data := await self.read(reqtable.chunk()):
                await self.send(data)

    with played(f"docs/how-to/{page}.md", tmp_path) as names, served(Echo) as upstream:
        handler = names[name]
        handler.target = f"tcp://127.0.0.1:{upstream.server_address[1]}"
        with served(handler) as server, Client(server.server_address) as client:
            assert client.ask(b"hello\n") == b"hello\n"
            assert client.end().rest() == b""
            wait_until(server, lambda: not len(server.table))
            assert server.stats()["finished"]["done"] == 1


def test_the_state_machine_whose_other_server_is_missing(tmp_path: Path, unused_port: int) -> None:
    with played("docs/how-to/talk-to-another-service.md", tmp_path) as names:
        handler = names["AskByStates"]
        handler.target = f"tcp://127.0.0.1:{unused_port}"
        with served(handler) as server, Client(server.server_address) as client:
            assert client.rest() == b"the other server does not answer\n"


def test_the_chat_and_the_poll(tmp_path: Path) -> None:
    with played("docs/how-to/tell-another-request.md", tmp_path) as found:
        _chat_and_poll(found)


def _chat_and_poll(found: dict[str, Any]) -> None:
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
