"""What is said of a WSGI application that fails, and how one is tested without sockets."""

from __future__ import annotations

import gc
import logging
import threading
import time

import pytest

from reqtable.config import Config
from reqtable.http import wsgi_handler
from reqtable.run.commands.http_options import KEEP_ALIVE_S, _limited
from reqtable.testing import exercise
from tests.support import WAIT_S, Client, wait_until
from tests.test_wsgi import HOST, PLAIN, POLICIES, get, serving

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def fails(environ, start_response):
    raise ValueError("it fails")


def fails_in_the_middle(environ, start_response):
    start_response("200 OK", PLAIN)
    yield b"part"
    raise ValueError("it fails")


def does_not_start(environ, start_response):
    return [b"x"]


def returns_text(environ, start_response):
    start_response("200 OK", PLAIN)
    return ["text"]


def returns_none(environ, start_response):
    start_response("200 OK", PLAIN)


def never_starts(environ, start_response):
    return []


class Site:
    def __call__(self, environ, start_response):
        return [b"x"]


@pytest.mark.parametrize("application", [fails, fails_in_the_middle])
def test_a_traceback_begins_in_the_application(application, caplog):
    exercise(wsgi_handler(application)).send(GET)
    [record] = [each for each in caplog.records if each.levelno == logging.ERROR]
    text = logging.Formatter().format(record)
    lines = [line for line in text.split("\n") if line.startswith('  File "')]
    assert lines
    assert all("test_wsgi_errors.py" in line for line in lines), text


@pytest.mark.parametrize(
    ("application", "words"),
    [
        (does_not_start, "the application sent a body before it called start_response()"),
        (returns_text, "an application's body is of bytes, not of str"),
        (returns_none, "an application returns an iterable of bytes, not None"),
        (never_starts, "the application returned without a call of start_response()"),
        (Site(), "the application sent a body before it called start_response()"),
    ],
    ids=["no start", "text", "none", "never", "instance"],
)
def test_a_mistake_names_the_application_and_its_line(application, words, caplog):
    exercise(wsgi_handler(application)).send(GET)
    [record] = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert record.exc_info is None
    name = getattr(application, "__name__", "Site")
    assert f": {name} (" in record.getMessage()
    assert __file__ in record.getMessage()
    assert record.getMessage().endswith(words)


def test_an_application_is_tested_without_a_socket():
    def application(environ, start_response):
        start_response("200 OK", PLAIN)
        return [environ["wsgi.input"].read()]

    client = exercise(wsgi_handler(application))
    client.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello")
    assert client.output.startswith(b"HTTP/1.1 200 OK\r\n")
    assert client.output.endswith(b"\r\n\r\nhello")


@pytest.mark.parametrize("dispatch", POLICIES)
@pytest.mark.parametrize("items", [[b"hello"], [b"he", b"llo"], (b"hello",), []])
def test_head_has_the_length_of_get(dispatch, items):
    def application(environ, start_response):
        start_response("200 OK", PLAIN)
        return items

    with serving(application, dispatch) as server:
        got, asked = get(server), get(server, method=b"HEAD")
    length = b"Content-Length: %d\r\n" % len(b"".join(items))
    assert length in got
    assert length in asked
    assert asked.endswith(b"\r\n\r\n")
    assert b"chunked" not in asked


def test_a_stall_is_mended_by_another_policy():
    assert wsgi_handler(fails)._stall_mend == "serve the application under policy 'pool'"


def test_the_commands_close_idle_connections_by_default():
    assert _limited(None, None, Config()).limits.idle_timeout_s == KEEP_ALIVE_S
    assert _limited(5.0, 7.0, Config()).limits.idle_timeout_s == 5.0
    assert _limited(5.0, 7.0, Config()).limits.drain_timeout_s == 7.0
    own = Config(origins={"limits.idle_timeout_s": "file"})
    assert _limited(None, None, own).limits.idle_timeout_s is None


def test_an_application_that_waits_is_unwound_when_its_client_resets():
    """Under greenlet, its `finally` blocks run at once, and not when the garbage is collected."""
    unwound, begun = threading.Event(), threading.Event()

    def application(environ, start_response):
        begun.set()
        try:
            time.sleep(60)
        finally:
            unwound.set()

    gc.disable()
    try:
        with serving(application, "greenlet") as server:
            with Client(server.server_address) as client:
                client.send(b"GET / HTTP/1.1\r\n%s\r\n" % HOST)
                assert begun.wait(WAIT_S)
                client.reset()
            assert unwound.wait(WAIT_S)
            wait_until(server, lambda: not len(server.table))
    finally:
        gc.enable()
