"""What docs/how-to/http.md, docs/how-to/serve-a-folder.md and docs/how-to/move-from-gunicorn.md show works."""

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
from tests.support import WAIT_S, Client, served, wait_until

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "how-to/http.md").read_text()


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)


def defined(label: str) -> dict[str, Any]:
    """Run the blocks of docs/how-to/http.md with that label, and return what they define."""
    found: dict[str, Any] = {"__name__": label}
    for block in blocks(PAGE, f"python {label}"):
        exec(compile(block, "docs/how-to/http.md", "exec"), found)
    return found


@contextlib.contextmanager
def typed(block: str, folder: Path) -> Iterator[tuple[str, int]]:
    """Type a block into a shell in a folder, but serve on a free port. Yields the address of the server."""
    *before, serve = block.replace("--bind tcp://127.0.0.1:8000", "").splitlines()
    script = "\n".join(["set -e", *before, f"exec {serve} --bind tcp://127.0.0.1:0"])
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with subprocess.Popen(
        ["sh", "-c", script], cwd=folder, stdout=subprocess.PIPE, text=True, env={**os.environ, "PATH": path}
    ) as process:
        try:
            assert process.stdout is not None
            yield "127.0.0.1", int(process.stdout.readline().rpartition(":")[2])
        finally:
            process.terminate()
            process.wait(WAIT_S)


@pytest.mark.parametrize("index", [0, 1, 2], ids=["folder", "flask", "chat"])
def test_five_minutes(tmp_path: Path, index: int) -> None:
    for name in ("hello", "chat"):
        (tmp_path / f"{name}.py").write_text(blocks(PAGE, f"python {name}")[0])
    shown = blocks(PAGE, "sh")
    assert len(shown) == 3
    with typed(shown[index], tmp_path) as address, Asking(address) as client:
        body = client.get("/").body
        assert (b"<h1>Hello</h1>\n", b"Hello from Flask", body)[index] == body
        if index == 2:
            assert b"new WebSocket(" in body
            uri = f"ws://127.0.0.1:{address[1]}"
            with connect(uri) as ann, connect(uri) as bob:
                ann.send("hello")  # to the three requests: one is no WebSocket
                assert ann.recv(WAIT_S) == bob.recv(WAIT_S) == "hello"


def test_the_api() -> None:
    found = defined("notes")
    with served(found["Notes"]) as server, Asking(server.server_address) as client:
        client.send(b"PUT /notes/2 HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nbread")
        assert client.answer().status == 204
        assert client.get("/notes/2").body == b'"bread"'
        assert client.get("/notes/3").status == 404


def test_an_answer_in_pieces() -> None:
    with served(defined("numbers")["Numbers"]) as server, Asking(server.server_address) as client:
        for _ in range(2):
            assert client.get("/").body.split() == [b"%d" % number for number in range(1000)]


def test_events() -> None:
    news = defined("events")["News"]
    with served(news) as server, Client(server.server_address) as client:
        client.send(b"GET / HTTP/1.0\r\n\r\n")
        wait_until(server, lambda: [each.handler.state_name for each in server.table] == ["listening"])
        for entry in server.table:
            assert entry.handler.tell("hello")
        while client.line() != b"data: hello\n":
            pass
        client.end()
        assert client.rest() == b"\n"


def test_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (program,) = blocks((DOCS / "how-to/serve-a-folder.md").read_text(), "python")
    (tmp_path / "page.html").write_text("<p>hello")
    served_as: list[Any] = []
    monkeypatch.setattr(reqtable, "serve", lambda handler, _: served_as.append(handler))
    exec(
        compile(program.replace("/srv/www", str(tmp_path)), "docs/how-to/serve-a-folder.md", "exec"),
        {"__name__": "folder"},
    )
    with served(served_as[0]) as server, Asking(server.server_address) as client:
        assert client.get("/page.html").fields["cache-control"] == "max-age=3600"
        assert client.get("/").status == 403


def test_the_page_on_moving_names_settings_that_exist() -> None:
    page = (DOCS / "how-to/move-from-gunicorn.md").read_text()
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
