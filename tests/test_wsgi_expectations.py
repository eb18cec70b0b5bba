"""What programs that come from another WSGI server expect of connections, bodies and files."""

from __future__ import annotations

import io

import pytest

from tests.support import Client
from tests.test_wsgi import HOST, PLAIN, serving


def application(environ, start_response):
    """Answer as the path says."""
    path = environ["PATH_INFO"]
    body = environ["wsgi.input"].read()
    if path.startswith("/file"):
        _, _, kind, length = path.split("/")
        start_response("200 OK", [*PLAIN, *([("Content-Length", length)] if length else [])])
        file = io.BytesIO(b"0123456789")
        return environ["wsgi.file_wrapper"](file) if kind == "wrapped" else iter([file.read()])
    if path == "/variables":
        start_response("200 OK", PLAIN)
        return [f"{environ.get('CONTENT_LENGTH')} {environ.get('HTTP_TRANSFER_ENCODING')}".encode()]
    start_response("200 OK", PLAIN)
    return iter([b"ok", body]) if path == "/items" else [b"ok" + body]


GET, POST = b"GET / HTTP/1.%d\r\n" + HOST, b"POST / HTTP/1.1\r\n" + HOST
LATER = b"GET /later HTTP/1.1\r\n%sConnection: close\r\n\r\n" % HOST

# What the client sends; how many answers come; what the first of them has, and has not.
EXPECTATIONS = {
    "HTTP/1.0 closes": (GET % 0 + b"\r\n" + LATER, 1, b"Connection: close\r\n", b"chunked"),
    "HTTP/1.0 stays open if asked": (
        GET % 0 + b"Connection: keep-alive\r\n\r\n" + LATER, 2, b"Connection: keep-alive\r\n", b"close"),
    "HTTP/1.0 closes after a body of unknown length": (
        b"GET /items HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" + LATER, 1, b"close\r\n\r\nok", b"chunked"),
    "HTTP/1.1 stays open": (GET % 1 + b"\r\n" + LATER, 2, b"Content-Length: 2\r\n", b"Connection"),
    "HTTP/1.1 closes if asked": (
        GET % 1 + b"Connection: close\r\n\r\n" + LATER, 1, b"Connection: close\r\n", b"chunked"),
    "HTTP/1.1 has chunks": (b"GET /items HTTP/1.1\r\n%s\r\n" % HOST + LATER, 2, b"chunked\r\n", b"Content-Length: 4"),
    "requests are answered in order": (GET % 1 + b"\r\n" + GET % 1 + b"\r\n" + LATER, 3, b"ok", b"\r\nConnection"),
    "a body is read": (POST + b"Content-Length: 3\r\n\r\nabc" + LATER, 2, b"okabc", b" 500 "),
    "a client may wait for 100": (
        POST + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\nabc" + LATER, 3, b"100 Continue\r\n\r\n", b" 417 "),
    "chunks are a body with a length": (
        POST.replace(b"/ ", b"/variables ") + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n" + LATER,
        2, b"3 None", b" 500 "),
    "a length that is no number": (POST + b"Content-Length: abc\r\n\r\nabc" + LATER, 1, b" 400 ", b"ok"),
    "a length beside chunks": (
        POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + LATER, 1, b" 400 ", b"ok"),
    "a chunk without a size": (POST + b"Transfer-Encoding: chunked\r\n\r\nz\r\n" + LATER, 1, b" 400 ", b"ok"),
    "a field that is too long": (GET % 1 + b"X: " + b"y" * 70_000 + b"\r\n\r\n" + LATER, 1, b" 431 ", b"ok"),
    "a body that is too long": (POST + b"Content-Length: 99999999999\r\n\r\n" + LATER, 1, b" 413 ", b"ok"),
    "a coding that nobody knows": (POST + b"Transfer-Encoding: gzip\r\n\r\n" + LATER, 1, b" 400 ", b"ok"),
    "HEAD has no body": (
        b"HEAD /file/wrapped/10 HTTP/1.1\r\n%s\r\n" % HOST + LATER, 2, b"Content-Length: 10\r\n", b"0123"),
    "a file of known length": (b"GET /file/wrapped/10 HTTP/1.1\r\n%s\r\n" % HOST + LATER, 2, b"0123456789", b"chunked"),
    "a file of unknown length": (b"GET /file/wrapped/ HTTP/1.1\r\n%s\r\n" % HOST + LATER, 2, b"0123456789", b" 500 "),
    "a file longer than its length": (
        b"GET /file/wrapped/5 HTTP/1.1\r\n%s\r\n" % HOST + LATER, 2, b"\r\n\r\n01234", b"56789"),
    "a file shorter than its length": (
        b"GET /file/plain/20 HTTP/1.1\r\n%s\r\n" % HOST + LATER, 1, b"0123456789", b" 500 "),
}  # fmt: skip


@pytest.mark.parametrize("dispatch", ["inline", "pool"])
@pytest.mark.parametrize("name", EXPECTATIONS)
def test_expectation(name, dispatch):
    sent, count, has, has_not = EXPECTATIONS[name]
    with serving(application, dispatch) as server, Client(server.server_address) as client:
        client.send(sent)
        data = client.rest()
    assert data.count(b"HTTP/1.1 ") == count
    first = data[: data.find(b"HTTP/1.1 ", 1)] if count > 1 else data
    assert has in first
    assert has_not not in first
