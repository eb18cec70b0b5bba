"""HTTP requests over sockets: framing, keep-alive, pipelining, and what is refused."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from reqtable import state, told
from reqtable.http import HTTPRequestHandler
from tests.support import Client, served, wait_until


class Shows(HTTPRequestHandler):
    """Answers with what it has read."""

    def do_GET(self) -> Any:
        return self.answer(200, f"{self.request.method} {self.request.path} {self.request.query}\n")

    def do_POST(self) -> Any:
        return self.answer(200, b"%d " % len(self.request.body) + self.request.body[:20])

    def do_DELETE(self) -> Any:
        raise ValueError("it fails")


HOST = b"Host: x\r\n"


def answers(data: bytes) -> list[tuple[int, dict[str, str], bytes]]:
    """Split answers into their status, fields and bodies. Only for answers that have a Content-Length, or no body."""
    found = []
    while data:
        head, _, rest = data.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in lines)}
        size = int(fields.get("content-length", 0))
        found.append((int(first.split()[1]), fields, rest[:size]))
        data = rest[size:]
    return found


@pytest.mark.parametrize("dispatch", ["inline", "pool", "thread", "fork"])
def test_requests_on_one_connection(dispatch):
    with served(Shows, dispatch) as server, Client(server.server_address) as client:
        client.send(b"GET /a?b=c HTTP/1.1\r\n%s\r\n" % HOST)
        client.send(b"POST / HTTP/1.1\r\n%sContent-Length: 5\r\n\r\nhello" % HOST)
        client.send(
            b"POST / HTTP/1.1\r\n%sTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n" % HOST
        )
        client.send(b"GET / HTTP/1.1\r\n%sConnection: close\r\n\r\n" % HOST)
        found = answers(client.rest())
        assert [(status, body) for status, _, body in found] == [
            (200, b"GET /a b=c\n"),
            (200, b"5 hello"),
            (200, b"5 abcde"),
            (200, b"GET / \n"),
        ]
        assert [fields.get("connection") for _, fields, _ in found] == [None, None, None, "close"]
        wait_until(server, lambda: not len(server.table))
        assert server.stats()["finished"]["done"] == 1


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\nHost: x\n\n", 400),
        (b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\n y\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505),
        (b"get / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nfffffff\r\n", 413),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (b"BREW / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 501),
        (b"PUT / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 405),
        (b"DELETE / HTTP/1.1\r\nHost: x\r\n\r\n", 500),
        (b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n" % (b"x" * 9000), 414),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: %s\r\n\r\n" % (b"x" * 9000), 431),
    ],
)
def test_what_is_refused(data, status):
    with served(Shows) as server, Client(server.server_address) as client:
        [(found, fields, body)] = answers(client.send(data).rest())
        assert found == status
        assert fields["connection"] == "close"
        assert body.startswith(b"%d " % status)


def test_a_request_that_the_client_breaks_off_is_refused():
    with served(Shows) as server:
        for data in (b"GET / HT", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc"):
            with Client(server.server_address) as client:
                [(status, _, _)] = answers(client.send(data).end().rest())
                assert status == 400


def test_head_and_http_1_0_and_100_continue():
    with served(Shows) as server:
        with Client(server.server_address) as client:
            client.send(b"HEAD / HTTP/1.1\r\n%sConnection: close\r\n\r\n" % HOST)
            data = client.rest()
            assert data.endswith(b"\r\n\r\n")
            assert b"Content-Length: 8\r\n" in data
        with Client(server.server_address) as client:
            client.send(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
            client.send(b"GET / HTTP/1.0\r\n\r\n")
            found = answers(client.rest())
            assert [fields["connection"] for _, fields, _ in found] == ["keep-alive", "close"]
        with Client(server.server_address) as client:
            client.send(b"POST / HTTP/1.1\r\n%sContent-Length: 2\r\nExpect: 100-continue\r\n\r\n" % HOST)
            assert client.receive(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.send(b"okGET / HTTP/1.1\r\n%sConnection: close\r\n\r\n" % HOST)
            assert [body for _, _, body in answers(client.rest())] == [b"2 ok", b"GET / \n"]


class Waits(Shows):
    """Answers once it is told."""

    def do_GET(self) -> Any:
        return self.told

    @state(told())
    def told(self, text: str) -> Any:
        return self.answer(200, text)


def test_answers_say_that_the_connection_closes_while_the_server_drains():
    with served(Waits) as server, Client(server.server_address) as client:
        client.send(b"GET / HTTP/1.1\r\n%s\r\n" % HOST)
        wait_until(server, lambda: any(row["path"] == "/" for row in server.table.snapshot()))
        [entry] = server.table
        draining = threading.Thread(target=server.drain, args=(20,))
        draining.start()
        wait_until(server, lambda: server._is_draining)
        entry.handler.tell("done")
        [(status, fields, body)] = answers(client.rest())
        assert (status, fields["connection"], body) == (200, "close", b"done")
        draining.join()
        assert not server._is_draining
