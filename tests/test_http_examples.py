"""The examples of HTTP: the API for notes, and server-sent events."""

from __future__ import annotations

import json
import re
from collections import deque

from examples.events import Events
from examples.http_api import Notes
from tests.support import Client, served, wait_until

HOST = b"Host: x\r\n"


def ask(client: Client, method: bytes, path: bytes, body: bytes = b"") -> tuple[int, bytes]:
    """Send a request and return the status and the body of its answer, which has a Content-Length."""
    client.send(b"%s %s HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n%s" % (method, path, HOST, len(body), body))
    status = int(client.line().split()[1])
    size = 0
    while (line := client.line()) != b"\r\n":
        name, _, value = line.lower().partition(b":")
        size = int(value) if name == b"content-length" else size
    return status, client.receive(size)


def test_the_api_for_notes(monkeypatch):
    monkeypatch.setattr(Notes, "notes", {})
    monkeypatch.setattr(Notes, "last", [0])
    with served(Notes) as server, Client(server.server_address) as client:
        assert ask(client, b"POST", b"/notes", b'{"text": "milk"}') == (201, b'{"id": 1}\n')
        status, body = ask(client, b"GET", b"/notes/1")
        assert (status, json.loads(body)) == (200, {"id": 1, "text": "milk"})
        assert ask(client, b"DELETE", b"/notes/1") == (204, b"")
        for id in (b"1", b"x", b"9" * 5000):
            status, _ = ask(client, b"GET", b"/notes/" + id)
            assert status == 404
        for count in (b"x", b"9" * 5000):
            status, _ = ask(client, b"GET", b"/numbers/" + count)
            assert status == 400
    with served(Notes) as server, Client(server.server_address) as client:
        client.send(b"POST /notes HTTP/1.1\r\n%sContent-Length: 1\r\n\r\n?" % HOST)
        assert client.line().startswith(b"HTTP/1.1 400 ")
    with served(Notes) as server, Client(server.server_address) as client:
        client.send(b"GET /numbers/5000 HTTP/1.0\r\n\r\n")
        lines = client.rest().partition(b"\r\n\r\n")[2].split()
        assert lines == [b"%d" % number for number in range(5000)]


def test_events_reach_all_who_listen():
    with served(Events) as server, Client(server.server_address) as sender:
        listeners = [Client(server.server_address) for _ in range(3)]
        for each in listeners:
            each.send(b"GET /events HTTP/1.0\r\n\r\n")
        wait_until(server, lambda: len(Events.listeners) == 3)
        assert ask(sender, b"POST", b"/events", b"hello") == (200, b"sent to 3\n")
        for each in listeners:
            while b"hello" not in (line := each.line()):
                assert line, "the stream ended"
            assert line == b"data: hello\n"
            each.close()
        wait_until(server, lambda: not Events.listeners)


def test_a_page_that_connects_again_gets_the_events_that_it_missed(monkeypatch):
    monkeypatch.setattr(Events, "recent", deque(maxlen=2))
    monkeypatch.setattr(Events, "last", [0])
    with served(Events) as server, Client(server.server_address) as sender:
        for text in (b"one", b"two", b"three"):
            assert ask(sender, b"POST", b"/events", text) == (200, b"sent to 0\n")
        for seen, missed in ((b"0", [b"two", b"three"]), (b"2", [b"three"]), (b"9" * 5000, []), (b"x", [])):
            with Client(server.server_address) as client:
                client.send(b"GET /events HTTP/1.0\r\nLast-Event-ID: %s\r\n\r\n" % seen)
                found = client.end().rest()  # the stream ends once the client has ended its side
                assert re.findall(rb"^data: (.*)$", found, re.MULTILINE) == missed
