"""The tutorials work: each is read from top to bottom, as its reader would."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

from reqtable.handover import sleeper
from reqtable.testing import exercise
from tests.browser import browsing
from tests.support import WAIT_S, served, wait_until
from tests.tutorial import Reader

TUTORIALS = Path(__file__).parent.parent / "docs" / "tutorials"

pytestmark = pytest.mark.timeout(600)  # they start dozens of processes


def needs(program: str) -> pytest.MarkDecorator:
    """Skip a test whose page uses a program that this machine lacks."""
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed: .ci/run installs it")


def test_the_first_server(tmp_path: Path) -> None:
    page = TUTORIALS / "first-server.md"
    assert len(page.read_text().splitlines()) < 200
    with Reader(page, tmp_path / "till") as reader:
        reader.read()


@pytest.mark.slow  # 30 commands
@needs("openssl")
@pytest.mark.skipif(sleeper.why_not_here() is not None, reason="this system has no sleepers, which takeover needs")
def test_an_smtp_receiver(tmp_path: Path) -> None:
    page = TUTORIALS / "smtp.md"
    assert len(page.read_text().splitlines()) < 450
    with Reader(page, tmp_path / "mailbox") as reader:
        reader.read()


def test_starttls_is_offered_once(tmp_path: Path) -> None:
    with Reader(TUTORIALS / "smtp.md", tmp_path) as reader:
        reader.write_files()
    found: dict[str, Any] = {"__name__": "smtp"}
    exec(compile((tmp_path / "smtp.py").read_text(), "smtp.py", "exec"), found)
    client = exercise(found["Smtp"]).send(b"EHLO me\r\n").expect(b"220 hello\r\n250-hello\r\n250 STARTTLS\r\n")
    client.send(b"STARTTLS\r\n").expect(b"220 go ahead\r\n")
    assert client.is_encrypted
    client.send(b"EHLO me\r\n").expect(b"250 hello\r\n")
    client.send(b"STARTTLS\r\n").expect(b"500 what?\r\n")


@pytest.mark.slow  # it waits for a long report, twice
@needs("curl")
def test_a_flask_application(tmp_path: Path) -> None:
    with Reader(TUTORIALS / "flask.md", tmp_path / "guests") as reader:
        reader.read()


def the_chat(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the handler as it is at the end of the page."""
    with Reader(TUTORIALS / "chat.md", folder) as reader:
        reader.write_files()
    monkeypatch.chdir(folder)
    found: dict[str, Any] = {"__name__": "chat"}
    exec(compile((folder / "chat.py").read_text(), "chat.py", "exec"), found)
    return found["Chat"]


def say(member: ClientConnection, text: str, answer: str) -> None:
    member.send(text)
    assert member.recv(WAIT_S) == answer


@pytest.mark.slow  # it restarts the server
def test_a_chat(tmp_path: Path) -> None:
    with ExitStack() as stack, Reader(TUTORIALS / "chat.md", tmp_path / "chat") as reader:
        members: list[ClientConnection] = []

        def join() -> None:
            address = f"ws://127.0.0.1:{reader.port(8000)}/tea"
            for name in ("ann", "bob"):
                member = stack.enter_context(connect(address, open_timeout=WAIT_S, ping_interval=None))
                members.append(member)
                say(member, name, f"{name} has joined")
            assert members[0].recv(WAIT_S) == "bob has joined"
            say(members[0], "/who", "ann: /who")
            assert members[1].recv(WAIT_S) == "ann: /who"

        reader.before["reqtable restart --check"] = join
        reader.read()
        ann, bob = members
        say(ann, "/who", "here: ann, bob")
        say(ann, "still here", "ann: still here")
        assert bob.recv(WAIT_S) == "ann: still here"


def test_the_chat_goes_on_after_a_bad_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(the_chat(tmp_path, monkeypatch)) as server:
        address = f"ws://127.0.0.1:{server.server_address[1]}/tea"

        def member() -> ClientConnection:
            return stack.enter_context(connect(address, open_timeout=WAIT_S, ping_interval=None))

        with ExitStack() as stack:
            nameless, ann, bob = member(), member(), member()
            for name in ("", b"", b"\xff\xfe"):
                nameless.send(name)
                assert nameless.recv(WAIT_S) == "Your name?"
            nameless.close()
            wait_until(server, lambda: len(server.table) == 2)
            say(ann, "ann", "ann has joined")
            say(bob, "bob", "bob has joined")
            assert ann.recv(WAIT_S) == "bob has joined"
            ann.send(b"\xff\xfe")
            say(ann, "hello", "ann: hello")
            assert bob.recv(WAIT_S) == "ann: hello"


def test_the_page_of_the_chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attack = "<img src=x onerror=document.title='run'>"
    with browsing(tmp_path / "profile") as browser, served(the_chat(tmp_path, monkeypatch)) as server:

        def enter(text: str, shown: int) -> None:
            """Enter a text when so many lines are shown."""
            browser.until(f"document.querySelectorAll('li').length === {shown}")
            browser.find("input").send_keys(text + "\n")

        browser.show(server, "/tea")
        enter("ann", 1)
        with browser.new_tab():
            browser.show(server, "/tea")
            enter("bob", 1)
            enter(attack, 2)
            browser.until("document.querySelectorAll('li').length === 3")
        browser.until("document.querySelectorAll('li').length === 5")
        assert browser.texts("li")[1:] == ["ann has joined", "bob has joined", f"bob: {attack}", "bob has left"]
        assert browser.run("return [document.images.length, document.title]") == [0, "Chat"]
        browser.driver.get("about:blank")
