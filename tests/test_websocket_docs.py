"""The handlers on docs/how-to/write-a-websocket.md work, and the page names what a handler has."""

from __future__ import annotations

import re
from typing import Any

import pytest

from reqtable.http import AsyncWebSocketHandler, WebSocketHandler
from reqtable.http.websocket import WebSocketMethods
from tests.pages import text_of, titled
from tests.support import WAIT_S, served, wait_until
from tests.test_websocket import ends_with, talking

PAGE = "docs/how-to/write-a-websocket.md"


def handler(title: str, name: str) -> Any:
    """Run a file of the page, and return the handler that it defines."""
    found: dict[str, Any] = {"__name__": "page"}
    exec(compile(titled(PAGE, title), title, "exec"), found)
    return found[name]


def test_the_echo() -> None:
    with served(handler("echo.py", "Echo")) as server, talking(server) as client:
        for message in ("text", b"bytes"):
            client.send(message)
            assert client.recv(WAIT_S) == message


def test_the_room() -> None:
    with served(handler("room.py", "Room")) as server, talking(server) as ann, talking(server) as bob:
        ann.send("ann")
        bob.send("bob")
        wait_until(server, lambda: sorted(entry.handler.name for entry in server.table) == ["ann", "bob"])
        ann.send(b"\xff\xfe")
        ann.send("hello")
        assert bob.recv(WAIT_S) == "ann: hello"


@pytest.mark.parametrize("name", ["", b"", b"\xff\xfe"])
def test_the_room_refuses_a_bad_name(name: str | bytes) -> None:
    with served(handler("room.py", "Room")) as server, talking(server) as client:
        client.send(name)
        assert ends_with(client) == (4000, "a name is needed")


def test_the_chat_drops_bytes() -> None:
    with served(handler("chat.py", "Chat")) as server, talking(server) as client:
        client.send(b"\xff\xfe")
        client.send("hello")
        assert client.recv(WAIT_S) == "hello"


def test_the_coroutine(capsys: pytest.CaptureFixture[str]) -> None:
    with served(handler("upper.py", "Upper")) as server:
        with talking(server) as client:
            client.send("text")
            assert client.recv(WAIT_S) == "TEXT"
            client.close(4000)
        wait_until(server, lambda: not len(server.table))
        assert capsys.readouterr().out == "1 messages, then the code 4000\n"


def test_the_page_names_all_that_a_handler_has() -> None:
    own = {name for cls in (WebSocketMethods, WebSocketHandler, AsyncWebSocketHandler) for name in vars(cls)}
    own |= {name for cls in (WebSocketMethods,) for name in cls.__annotations__}
    public = {name for name in own if not name.startswith("_")} - {"entry", "send"}
    general = {"on_head", "on_eof", "on_error", "on_limit", "on_timeout", "respond", "message"}
    tables = "".join(re.findall(r"^\|.*\n", text_of(PAGE), flags=re.MULTILINE))
    assert {name for name in public - general if f"`{name}" not in tables} == set()
