"""The access log of HTTP: what a line says of requests under every policy, of errors, and of clients that leave."""

from __future__ import annotations

import ipaddress
import json
import logging
import logging.handlers
import os
import socket
import struct
import time

import pytest

from reqtable.http import HTTPRequestHandler
from reqtable.server.access_log import JSONFormatter
from reqtable.testing import exercise
from tests.support import Client, served, wait_until
from tests.test_wsgi import HOST, PLAIN, POLICIES, echo, get, serving


@pytest.fixture
def lines():
    """Return a function that reads lines of the access log as their fields, also lines that children write."""
    reader, writer = os.pipe()
    log = logging.getLogger("reqtable.access")
    with os.fdopen(reader) as file, os.fdopen(writer, "w") as stream:
        handler = logging.StreamHandler(stream)
        handler.setFormatter(JSONFormatter())
        log.addHandler(handler)
        before = log.level
        log.setLevel(logging.INFO)
        try:
            yield lambda count: [json.loads(file.readline()) for _ in range(count)]
        finally:
            log.setLevel(before)
            log.removeHandler(handler)


@pytest.mark.parametrize("dispatch", POLICIES)
def test_a_line_for_each_request_of_an_application(dispatch, lines):
    def application(environ, start_response):
        time.sleep(0.05)
        return echo(environ, start_response)

    with serving(application, dispatch) as server:
        for _ in range(2):
            get(server, b"/a?b", b'User-Agent: say "x"\x9b\x85\r\n')
        wait_until(server, lambda: not len(server.table))
        first, second = lines(2)
    assert (first["logger"], first["client"]) == ("reqtable.access.http", "127.0.0.1")
    assert (first["target"], first["status"], first["bytes_out"], first["is_whole"]) == ("/a?b", 200, 9, True)
    assert 0.05 <= first["duration_s"] < 20
    assert '"say \\x22x\\x22\\x9B\\x85"' in first["message"]
    assert first["request_id"] in first["message"]
    assert first["request_id"] != second["request_id"]


@pytest.mark.parametrize("dispatch", POLICIES)
def test_the_application_has_the_id_of_the_log(dispatch, lines):
    def application(environ, start_response):
        start_response("200 OK", [("X-Id", environ["reqtable.request_id"]), *PLAIN])
        return [b"x"]

    with serving(application, dispatch) as server:
        answer = get(server)
        (line,) = lines(1)
    assert b"X-Id: %s\r\n" % line["request_id"].encode() in answer


def test_a_request_that_is_refused_has_its_own_time(lines):
    with serving(echo, "inline") as server, Client(server.server_address) as client:
        client.send(b"BAD\r\n\r\n")
        client.rest()
        (line,) = lines(1)
    assert (line["status"], line["method"]) == (400, "-")
    assert line["duration_s"] < 20


def test_the_log_has_the_client_behind_a_trusted_proxy(lines):
    trusted = (ipaddress.ip_network("127.0.0.1"),)
    with serving(echo, "inline", trusted=trusted) as server, Client(server.server_address) as client:
        for fields in (b"X-Forwarded-For: 192.0.2.7\r\n", b""):
            client.send(b"GET / HTTP/1.1\r\n%s%s\r\n" % (HOST, fields))
        found = lines(2)
    assert [each["client"] for each in found] == ["192.0.2.7", "127.0.0.1"]
    assert found[0]["message"].startswith("192.0.2.7 - - [")
    assert found[0]["peer"].startswith("127.0.0.1:")


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "pool", "thread"])
@pytest.mark.parametrize("way", ["items", "file"])
def test_a_client_that_leaves_is_logged_with_what_it_took(dispatch, way, lines, tmp_path):
    size = 20_000_000

    def application(environ, start_response):
        start_response("200 OK", [*PLAIN, ("Content-Length", str(size))])
        if way == "items":
            return (b"x" * 100_000 for _ in range(size // 100_000))
        return environ["wsgi.file_wrapper"]((tmp_path / "large").open("rb"))

    with (tmp_path / "large").open("wb") as file:
        file.truncate(size)
    with serving(application, dispatch) as server:
        client = socket.create_connection(server.server_address)
        client.sendall(b"GET / HTTP/1.1\r\n%s\r\n" % HOST)
        client.recv(2000, socket.MSG_WAITALL)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        wait_until(server, lambda: not len(server.table))
        (line,) = lines(1)
    assert (line["status"], line["is_whole"]) == (200, False)
    assert 1000 <= line["bytes_out"] < size


@pytest.mark.parametrize("dispatch", ["pool", "thread", "fork"])
def test_a_request_that_ends_early_has_one_line(dispatch, lines):
    class Blocks(HTTPRequestHandler):
        def do_GET(self):
            os.write(entered, b"x")
            time.sleep(0.5)  # in a child it is killed
            return self.answer(200, "late")

    reader, entered = os.pipe()
    with served(Blocks, dispatch) as server, Client(server.server_address) as client:
        client.send(b"GET / HTTP/1.1\r\n%s\r\n" % HOST)
        os.read(reader, 1)
        (entry,) = server.table
        server.table.cancel(entry.id)
        assert client.rest().startswith(b"HTTP/1.1 503 ")
        (first,) = lines(1)
    with served(Blocks, dispatch) as server, Client(server.server_address) as client:
        client.send(b"POST / HTTP/1.1\r\n%sConnection: close\r\n\r\n" % HOST)
        assert client.rest().startswith(b"HTTP/1.1 405 ")
        (second,) = lines(1)
    os.close(reader)
    os.close(entered)
    assert (first["status"], second["status"]) == (503, 405)


def test_an_application_that_fails_half_way_is_not_whole(lines):
    def application(environ, start_response):
        start_response("200 OK", PLAIN)
        yield b"part"
        raise ValueError("it fails")

    with serving(application, "inline") as server:
        get(server)
        (line,) = lines(1)
    assert (line["status"], line["bytes_out"], line["is_whole"]) == (200, 4, False)


def test_a_client_that_left_before_its_answer_has_the_status_499(caplog):
    class Waits(HTTPRequestHandler):
        def do_POST(self):
            return self.answer(200)

    caplog.set_level(logging.INFO, "reqtable.access")
    exercise(Waits).send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nab").reset()
    [record] = caplog.records
    assert (record.request["status"], record.request["bytes_in"]) == (499, 2)
