"""The context of a WSGI application (contextvars): one for each request, wherever its parts run."""

from __future__ import annotations

from contextvars import ContextVar

import pytest

from tests.support import Client, wait_until
from tests.test_wsgi import HOST, PLAIN, POLICIES, get, serving

NAME: ContextVar[str] = ContextVar("NAME", default="none")


class Items:
    """Gives what the variable holds, `count` times, and resets the variable in `close()`, as Flask does."""

    def __init__(self, token, count, closed):
        self.token = token
        self.left = count
        self.closed = closed

    def __iter__(self):
        return self

    def __next__(self):
        if not self.left:
            raise StopIteration
        self.left -= 1
        return NAME.get().encode() + b"," * 70_000

    def close(self):
        NAME.reset(self.token)  # raises ValueError in another context
        self.closed.append(NAME.get())


@pytest.mark.parametrize("dispatch", POLICIES)
def test_each_item_is_made_in_the_context_of_the_call(dispatch):
    closed = []

    def application(environ, start_response):
        token = NAME.set(environ["QUERY_STRING"])
        start_response("200 OK", PLAIN)
        return Items(token, 20, closed)

    with serving(application, dispatch) as server:
        with Client(server.server_address) as first, Client(server.server_address) as second:
            for client, name in ((first, b"a"), (second, b"b")):
                client.send(b"GET /?%s HTTP/1.0\r\n%s\r\n" % (name, HOST))
            for client, name in ((first, b"a"), (second, b"b")):
                assert client.rest().partition(b"\r\n\r\n")[2] == (name + b"," * 70_000) * 20
        wait_until(server, lambda: not len(server.table))
    assert closed == ([] if dispatch == "fork" else ["none", "none"])
    assert NAME.get() == "none"


@pytest.mark.parametrize("dispatch", POLICIES)
def test_a_context_ends_with_its_request(dispatch):
    def application(environ, start_response):
        before = NAME.get()
        NAME.set("left over")
        start_response("200 OK", PLAIN)
        return [before.encode()]

    with serving(application, dispatch, size=1) as server:
        assert [get(server).rpartition(b"\r\n")[2] for _ in range(3)] == [b"none"] * 3


@pytest.mark.parametrize("dispatch", POLICIES)
def test_flask_streams_with_its_context(dispatch):
    flask = pytest.importorskip("flask")
    app = flask.Flask(__name__)

    @app.get("/<name>")
    def stream(name):
        def rows():
            for _ in range(20):
                yield flask.request.path.encode() + b"," * 70_000

        return flask.Response(flask.stream_with_context(rows()))

    with serving(app, dispatch) as server:
        answer = get(server, b"/x", version=b"1.0")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.partition(b"\r\n\r\n")[2] == (b"/x" + b"," * 70_000) * 20
