"""Who may use the port of the live page, and for what."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import reqtable
from reqtable import Config, ControlOptions, Transition
from reqtable.control.page import HIDDEN, page_file
from reqtable.http import HTTPRequestHandler
from tests.pages import blocks
from tests.support import WAIT_S, Client, serving
from tests.test_control import Store, clients

TOKEN = "a long random text"


class Visitor:
    """Sends requests to the port of the page, as a browser would unless told otherwise."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.host = f"{host}:{port}"

    def ask(
        self, target: str, method: str = "GET", body: Any = None, **fields: str | None
    ) -> tuple[int, dict[str, str], bytes]:
        """Return the status, the fields and the body. A field that is None is left out."""
        sent = {"host": self.host, **({} if method == "GET" else {"origin": f"http://{self.host}"}), **fields}
        connection = http.client.HTTPConnection(self.host, timeout=WAIT_S)
        try:
            connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
            data = b"" if body is None else json.dumps(body).encode()
            for name, value in {**sent, "content-length": str(len(data))}.items():
                if value is not None:
                    connection.putheader(name, value)
            connection.endheaders(data)
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def get(self, target: str) -> Any:
        status, _, body = self.ask(target)
        assert status == 200, body
        return json.loads(body)

    def rows_once(self, count: int) -> list[Any]:
        """Ask for rows until there are so many. pytest-timeout is the backstop."""
        while len(rows := self.get("/v1/requests")) != count:
            pass
        return rows


def port_in(caplog: pytest.LogCaptureFixture) -> int:
    """Return the port of the page, as the log names it."""
    while not (found := re.findall(r"control: listening on [\d.:\[\]]+:(\d+)", caplog.text)):
        pass  # the server's thread has not got so far; pytest-timeout is the backstop
    return int(found[-1])


@contextlib.contextmanager
def paged(
    caplog: pytest.LogCaptureFixture, handler: Any = Store, token: str | None = None, **options: Any
) -> Iterator[tuple[Any, Visitor]]:
    """Serve `handler`, with a page on a free port."""
    caplog.set_level(logging.INFO, "reqtable.control")
    caplog.clear()
    config = Config(control=ControlOptions(page="127.0.0.1:0", token=token), **options)
    with serving(reqtable.TCPServer(("127.0.0.1", 0), handler, config=config)) as server:
        yield server, Visitor(port_in(caplog))


def test_the_page_runs_only_its_own_script(caplog: pytest.LogCaptureFixture) -> None:
    with paged(caplog) as (_, visitor):
        status, fields, body = visitor.ask("/")
        assert (status, fields["content-type"], body) == (200, "text/html; charset=utf-8", page_file()[0])
        policy = fields["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert re.search("script-src 'sha256-[^ ]*'; style-src 'sha256-[^ ]*';", policy)
        for target in ("/", "/v1/stats", "/v1/requests", "/nothing", "/v1/requests/999"):
            fields = visitor.ask(target)[1]
            assert fields["content-security-policy"] == policy
            assert fields["cache-control"] == "no-store"
            assert fields["x-content-type-options"] == "nosniff"
            assert fields["referrer-policy"] == "no-referrer"
            assert fields["cross-origin-resource-policy"] == "same-origin"
            assert "access-control-allow-origin" not in fields


def test_the_page_puts_in_nothing_as_markup() -> None:
    text = page_file()[0].decode()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\bon\w+=\"|style=", text)
    assert re.findall(r"(?:https?:)?//[\w.]+", re.sub(r"(?m)^\s*//.*$| // .*$", "", text)) == [
        *["http://www.w3.org"] * 2  # the names of SVG
    ]


def test_what_can_be_looked_at(caplog: pytest.LogCaptureFixture) -> None:
    with paged(caplog) as (server, visitor), clients(server, 2) as made:
        rows = visitor.rows_once(2)
        assert made[0].ask(b"hello\n") == b"hello\n"
        assert visitor.get(f"/v1/requests/{rows[0]['id']}")["peer"] == rows[0]["peer"]
        assert visitor.get("/v1/stats")["entries"] == 2
        assert visitor.get("/v1/workers")[0]["entries"] == 2
        assert visitor.get("/v1/machine")[0]["handler"] == "Store"
        for target in ("/v1/stacks", "/v1/log-level", "/healthz"):
            assert visitor.ask(target)[0] == 404
        assert visitor.ask("/v1/reload", "POST", {})[0] == 404
        assert visitor.ask("/v1/log-level", "PUT", {"level": "debug"})[0] == 404


def test_the_configuration_is_shown_without_secrets(caplog: pytest.LogCaptureFixture) -> None:
    executor = reqtable.ExecutorOptions("concurrent.futures:ThreadPoolExecutor", {"initargs": ["a password"]})
    with paged(caplog, token=TOKEN, executor=executor) as (_, visitor):
        for method, body in (("GET", None), ("PATCH", {"limits.entries_max": 99})):
            status, _, text = visitor.ask("/v1/config", method, body, authorization=f"Bearer {TOKEN}")
            assert status == 200
            assert TOKEN.encode() not in text
            assert b"a password" not in text
            found = {each["key"]: each["value"] for each in json.loads(text)}
            assert found["control.token"] == found["executor.arguments"] == HIDDEN
        assert found["limits.entries_max"] == 99


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST", "127.0.0.1", "[::1]"])
def test_own_names(caplog: pytest.LogCaptureFixture, name: str) -> None:
    with paged(caplog) as (_, visitor):
        for host in (name, f"{name}:8080"):  # the near end of a tunnel may have another port
            assert visitor.ask("/v1/stats", host=host)[0] == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.", "127.0.0.1:80@evil.example", "", None],
)
def test_another_host_is_refused(caplog: pytest.LogCaptureFixture, host: str | None) -> None:
    with paged(caplog, token=TOKEN) as (server, visitor), clients(server, 1) as [client]:
        [row] = visitor.rows_once(1)
        for target in ("/", "/v1/requests", "/v1/events"):
            assert visitor.ask(target, host=host)[0] in (400, 403)
        cancel = f"/v1/requests/{row['id']}/cancel"
        authorization, origin = f"Bearer {TOKEN}", f"http://{host}"
        assert visitor.ask(cancel, "POST", {}, host=host, origin=origin, authorization=authorization)[0] in (400, 403)
        assert client.ask(b"still\n") == b"still\n"


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://{host}", "http://localhost:1", ""])
def test_another_origin_is_refused(caplog: pytest.LogCaptureFixture, origin: str) -> None:
    with paged(caplog, token=TOKEN) as (server, visitor), clients(server, 1) as [client]:
        [row] = visitor.rows_once(1)
        origin = origin.format(host=visitor.host)
        assert visitor.ask("/v1/requests", origin=origin)[0] == 403
        cancel = f"/v1/requests/{row['id']}/cancel"
        assert visitor.ask(cancel, "POST", {}, origin=origin, authorization=f"Bearer {TOKEN}")[0] == 403
        assert client.ask(b"still\n") == b"still\n"


def test_the_page_on_ipv6(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "reqtable.control")
    config = Config(control=ControlOptions(page="[::1]:0", token=TOKEN))
    with serving(reqtable.TCPServer(("127.0.0.1", 0), Store, config=config)):
        visitor = Visitor(port_in(caplog), "[::1]")
        assert visitor.get("/v1/stats")["entries"] == 0
        assert visitor.ask("/v1/drain", "POST", {"stay": True}, authorization=f"Bearer {TOKEN}")[0] == 200
        assert visitor.ask("/v1/stats", host="[::2]")[0] == 403


def test_a_page_that_looks_does_not_fill_the_access_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "reqtable.access")
    with paged(caplog, Pong) as (server, visitor), clients(server, 1) as [client]:
        client.send(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert client.rest().endswith(b"pong")
        for target in ("/", "/v1/stats", "/v1/requests", "/nothing"):
            visitor.ask(target)
    assert [each.request["target"] for each in caplog.records if each.name == "reqtable.access.http"] == ["/"]  # type: ignore[attr-defined]


class Pong(HTTPRequestHandler):
    def do_GET(self) -> Transition:
        return self.answer(200, "pong")


ACTIONS = [
    ("POST", "/v1/requests/{id}/cancel", {}),
    ("POST", "/v1/requests/cancel", {"handler": "Store"}),
    ("POST", "/v1/drain", {}),
    ("PATCH", "/v1/config", {"limits.entries_max": 1}),
]


@pytest.mark.parametrize("token", [None, ""])
@pytest.mark.parametrize(("method", "target", "body"), ACTIONS)
def test_without_a_token_in_the_configuration_there_is_no_action(
    caplog: pytest.LogCaptureFixture, token: str | None, method: str, target: str, body: Any
) -> None:
    with paged(caplog, token=token) as (server, visitor), clients(server, 1) as [client]:
        [row] = visitor.rows_once(1)
        for authorization in (None, "Bearer ", "Bearer None", "Bearer"):
            status, _, text = visitor.ask(target.format(id=row["id"]), method, body, authorization=authorization)
            assert (status, b"read-only" in text) == (403, True)
        assert client.ask(b"still\n") == b"still\n"
        stats = visitor.get("/v1/stats")
        assert (stats["is_draining"], stats["entries_max"] > 1) == (False, True)


@pytest.mark.parametrize(("method", "target", "body"), ACTIONS)
def test_an_action_needs_the_right_token(caplog: pytest.LogCaptureFixture, method: str, target: str, body: Any) -> None:
    with paged(caplog, token=TOKEN) as (server, visitor), clients(server, 1) as [client]:
        [row] = visitor.rows_once(1)
        wrong = (None, "", TOKEN, f"Basic {TOKEN}", "Bearer", "Bearer wrong", f"Bearer {TOKEN}x", "Bearer \xfc")
        for authorization in wrong:
            status, fields, _ = visitor.ask(target.format(id=row["id"]), method, body, authorization=authorization)
            assert (status, fields["www-authenticate"]) == (401, "Bearer")
        status, _, _ = visitor.ask(
            target.format(id=row["id"]), method, body, origin=None, authorization=f"Bearer {TOKEN}"
        )
        assert status == 403
        assert client.ask(b"still\n") == b"still\n"
        assert visitor.get("/v1/stats")["is_draining"] is False


def test_the_right_token_cancels_one_request_and_only_it(caplog: pytest.LogCaptureFixture) -> None:
    with paged(caplog, token=TOKEN) as (server, visitor), clients(server, 3) as made:
        rows = visitor.rows_once(3)
        peers = {f"127.0.0.1:{each.socket.getsockname()[1]}": each for each in made}
        first, *others = rows
        cancel = f"/v1/requests/{first['id']}/cancel"
        status, _, body = visitor.ask(cancel, "POST", {}, authorization=f"Bearer {TOKEN}")
        assert (status, json.loads(body)) == (
            200,
            {"cancelled": [first["id"]], "missing": [], "goes_on": [], "call_threads": None},
        )
        assert peers[first["peer"]].rest() == b""
        for row in others:
            assert peers[row["peer"]].ask(b"still\n") == b"still\n"
        assert f"cancels {first['id']}" in caplog.text
        assert "control: the page, used from 127.0.0.1:" in caplog.text


def test_a_refusal_does_not_wait_for_the_body(caplog: pytest.LogCaptureFixture) -> None:
    with paged(caplog, token=TOKEN) as (_, visitor):
        with Client(("127.0.0.1", int(visitor.host.rpartition(":")[2]))) as client:
            head = f"POST /v1/requests/cancel HTTP/1.1\r\nHost: {visitor.host}\r\nContent-Length: 900000\r\n\r\n"
            client.send(head.encode())
            assert client.line() == b"HTTP/1.1 403 Forbidden\r\n"
            assert b"Connection: close\r\n" in client.rest()


def test_the_settings_in_the_documentation(tmp_path: Path) -> None:
    options = []
    for block in blocks("docs/how-to/show-the-live-page.md", "toml"):
        (tmp_path / "reqtable.toml").write_text(block.text)
        options.append(Config.load(tmp_path / "reqtable.toml").control)
    assert options == [
        ControlOptions(page="127.0.0.1:9101"),
        ControlOptions(page="127.0.0.1:9101", token="a long random text"),
    ]
