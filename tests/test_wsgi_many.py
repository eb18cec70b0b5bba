"""Thousands of slow clients of a WSGI application beside honest ones, with four threads."""

from __future__ import annotations

import selectors
import socket

import pytest

from tests.support import wait_until
from tests.test_wsgi import HOST, PLAIN, get, serving

SLOW = 2000  # uploads, and as many downloads
HONEST = 10


def application(environ, start_response):
    if environ["PATH_INFO"] == "/large":
        start_response("200 OK", [*PLAIN, ("Content-Length", "4000000")])
        return (b"x" * 40_000 for _ in range(100))
    start_response("200 OK", [*PLAIN])
    return [b"%d" % len(environ["wsgi.input"].read())]


@pytest.mark.slow
def test_nobody_waits_for_a_slow_client():
    uploads, downloads = [], []
    with serving(application, size=4) as server:
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)  # connections inherit it
        try:
            for _ in range(SLOW):
                upload = socket.create_connection(server.server_address)
                uploads.append(upload)
                upload.send(b"POST / HTTP/1.1\r\n%sContent-Length: 1000\r\n\r\nx" % HOST)
                download = socket.socket()
                downloads.append(download)
                download.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                download.connect(server.server_address)
                download.send(b"GET /large HTTP/1.1\r\n%s\r\n" % HOST)
            wait_until(server, lambda: sum(entry.state.name == "WRITING" for entry in server.table) == SLOW)
            for i in range(20):
                for upload in uploads[i::20]:
                    upload.send(b"x")  # a byte at a time
                for _ in range(HONEST):
                    assert get(server).endswith(b"\r\n\r\n0")
            held = sum(entry.output.held for entry in server.table)
            assert held < SLOW * 400_000
            assert _finish(uploads) == SLOW
        finally:
            for each in (*uploads, *downloads):
                each.close()
        wait_until(server, lambda: not len(server.table))


def _finish(uploads):
    """Send the rest of each body. Returns how many are answered as they must be."""
    with selectors.DefaultSelector() as selector:
        for each in uploads:
            each.sendall(b"x" * 998)
            selector.register(each, selectors.EVENT_READ)
        count = 0
        while selector.get_map():
            for key, _ in selector.select(20) or pytest.fail("an upload was not answered"):
                count += key.fileobj.recv(4096).endswith(b"\r\n\r\n1000")
                selector.unregister(key.fileobj)
    return count
