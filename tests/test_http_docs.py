"""The servers and handlers of the pages on HTTP work, and the page on gunicorn names settings that exist."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import connect

import reqtable
from reqtable.config import Config, effective
from reqtable.http import WSGIHandler
from reqtable.run.commands.wsgi import wsgi_command
from tests.http_client import Asking
from tests.pages import blocks, text_of, titled, write_files
from tests.support import WAIT_S, Client, Started, served, wait_until

HOW_TO = "docs/how-to"


def defined(page: str, title: str) -> dict[str, Any]:
    """Run a file of a page, and return the names that it defines."""
    found: dict[str, Any] = {"__name__": Path(title).stem}
    exec(compile(titled(f"{HOW_TO}/{page}.md", title), title, "exec"), found)
    return found


@contextlib.contextmanager
def typed(block: str, folder: Path) -> Iterator[tuple[str, int]]:
    """Type a block into a shell in a folder, but serve on a free port. Yields the address of the server."""
    *before, serve = block.replace("--bind tcp://127.0.0.1:8000", "").splitlines()
    script = "\n".join(["set -e", *before, f"exec {serve} --bind tcp://127.0.0.1:0"])
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with Started(
        ["sh", "-c", script], cwd=folder, stdout=subprocess.PIPE, text=True, env={**os.environ, "PATH": path}
    ) as process:
        try:
            assert process.stdout is not None
            yield "127.0.0.1", int(process.stdout.readline().rpartition(":")[2])
        finally:
            process.terminate()
            process.wait(WAIT_S)


def first_sh(page: str, folder: Path, index: int = 0) -> str:
    """Write the files of a page, and return one of the blocks that are typed."""
    write_files(f"{HOW_TO}/{page}.md", folder)
    return blocks(f"{HOW_TO}/{page}.md", "sh")[index].text


@pytest.mark.parametrize(
    ("page", "body"), [("serve-a-folder", b"<h1>Hello</h1>\n"), ("serve-wsgi", b"Hello\n")], ids=["folder", "flask"]
)
def test_typed_as_it_stands(page: str, body: bytes, tmp_path: Path) -> None:
    with typed(first_sh(page, tmp_path), tmp_path) as address, Asking(address) as client:
        assert client.get("/").body == body


def test_the_chat(tmp_path: Path) -> None:
    with typed(first_sh("write-a-websocket", tmp_path, 1), tmp_path) as address, Asking(address) as client:
        assert b"new WebSocket(" in client.get("/").body
        uri = f"ws://127.0.0.1:{address[1]}"
        with connect(uri) as ann, connect(uri) as bob:
            ann.send("hello")  # to the three requests: one is no WebSocket
            assert ann.recv(WAIT_S) == bob.recv(WAIT_S) == "hello"


def test_the_api() -> None:
    found = defined("write-an-http-api", "notes.py")
    with served(found["Notes"]) as server, Asking(server.server_address) as client:
        client.send(b"PUT /notes/2 HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nbread")
        assert client.answer().status == 204
        assert client.get("/notes/2").body == b'"bread"'
        assert client.get("/notes/3").status == 404


def test_an_answer_in_pieces() -> None:
    with (
        served(defined("stream-an-answer", "counting.py")["Numbers"]) as server,
        Asking(server.server_address) as client,
    ):
        for _ in range(2):
            assert client.get("/").body.split() == [b"%d" % number for number in range(1000)]


def test_events() -> None:
    news = defined("stream-events", "news.py")["News"]
    with served(news) as server, Client(server.server_address) as client:
        client.send(b"GET / HTTP/1.0\r\n\r\n")
        wait_until(server, lambda: [each.handler.state_name for each in server.table] == ["listening"])
        for entry in server.table:
            assert entry.handler.tell("hello")
        while client.line() != b"data: hello\n":
            pass
        client.end()
        assert client.rest() == b"\n"


def test_the_folder(tmp_path: Path) -> None:
    program = titled(f"{HOW_TO}/serve-a-folder.md", "folder.py").replace("/srv/www", str(tmp_path))
    (tmp_path / "page.html").write_text("<p>hello")
    found: dict[str, Any] = {"__name__": "folder"}
    exec(program, found)
    with served(found["Site"]) as server, Asking(server.server_address) as client:
        assert client.get("/page.html").fields["cache-control"] == "max-age=3600"
        assert client.get("/").status == 403


def test_the_page_on_moving_names_settings_that_exist() -> None:
    page = text_of(f"{HOW_TO}/move-from-gunicorn.md")
    ours = "\n".join(line.split("|")[3] for line in page.splitlines() if line.startswith("| "))
    options = {option for each in wsgi_command.params for option in each.opts}
    assert set(re.findall(r"--[a-z][\w-]*", ours)) <= options
    named = {f"{section}.{name}" for section, name in re.findall(r"\[(\w+)\] (\w+)", page)}
    assert len(named) > 8
    assert named <= {name for name, _, _ in effective(Config())}
    for name in re.findall(r"`(\w+)` of the settings", page):
        assert hasattr(WSGIHandler, name)
    for limit, value in re.findall(r"`\[limits\] (\w+) = (\d+)`, the default", page):
        assert getattr(reqtable.Limits(), limit) == int(value)
    assert f"`[pool] size = {Config().pool.size}`, the default" in page
