"""WSGI applications: what they are given, what they may answer, and that a slow client holds nobody up."""

from __future__ import annotations

import contextlib
import gc
import io
import ipaddress
import re
import socket
import threading
import time
from wsgiref.validate import validator

import pytest

from reqtable.config import Config, GreenletOptions, PoolOptions
from reqtable.http import wsgi_handler
from reqtable.http.head import parse_head
from reqtable.http.wsgi_call import ApplicationCall
from reqtable.http.wsgi_environ import believe, path_and_query
from tests.support import Client, served, wait_until
from tests.test_http import answers

POLICIES = ["inline", "greenlet", "pool", "thread", "fork"]
HOST = b"Host: x\r\n"
PLAIN = [("Content-Type", "text/plain")]


@contextlib.contextmanager
def serving(application, dispatch="pool", size=4, **settings):
    """Serve `application` during the block."""
    import reqtable
    from tests.support import serving as running

    config = Config(pool=PoolOptions(size=size), greenlet=GreenletOptions(suspend_all_sockets=True))
    handler = wsgi_handler(application, **settings)
    kind = type("Server", (reqtable.TCPServer,), {"request_queue_size": 1024})
    with running(kind(("127.0.0.1", 0), handler, dispatch=dispatch, config=config)) as server:
        yield server


def get(server, target=b"/", fields=b"", method=b"GET", version=b"1.1"):
    """Return all that one request on a connection of its own is answered with."""
    with Client(server.server_address) as client:
        client.send(b"%s %s HTTP/%s\r\n%s%sConnection: close\r\n\r\n" % (method, target, version, HOST, fields))
        return client.rest()


def echo(environ, start_response):
    body = environ["wsgi.input"].read()
    start_response("200 OK", PLAIN)
    return [f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']} {environ['QUERY_STRING']} ".encode("latin-1"), body]


def shown(environ, start_response):
    start_response("200 OK", [*PLAIN])
    return ["\n".join(f"{k}={v}" for k, v in sorted(environ.items()) if isinstance(v, str)).encode("latin-1")]


def fields_of(data):
    """Return the variables that `shown` has answered with."""
    return dict(line.partition("=")[::2] for line in data.partition(b"\r\n\r\n")[2].decode("latin-1").split("\n"))


@pytest.mark.parametrize("dispatch", POLICIES)
@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"POST"])
def test_the_validator_finds_nothing(dispatch, method):
    def application(environ, start_response):
        if environ["REQUEST_METHOD"] == "POST":
            assert environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])) == b"hello"
        start_response("200 OK", [*PLAIN, ("Content-Length", "3")])
        return [b"abc"]

    with serving(validator(application), dispatch) as server:
        body = b"hello" if method == b"POST" else b""
        with Client(server.server_address) as client:
            client.send(
                b"%s /a?b HTTP/1.1\r\n%sContent-Length: %d\r\nConnection: close\r\n\r\n%s"
                % (method, HOST, len(body), body)
            )
            status, fields, answer = answers(client.rest())[0]
        assert (status, fields["content-length"]) == (200, "3")
        assert answer == (b"" if method == b"HEAD" else b"abc")


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "pool"])
def test_requests_on_one_connection(dispatch):
    with serving(echo, dispatch) as server, Client(server.server_address) as client:
        client.send(b"GET /a%%20b?c HTTP/1.1\r\n%s\r\n" % HOST)
        client.send(b"POST /p HTTP/1.1\r\n%sTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n" % HOST)
        client.send(b"GET /z HTTP/1.1\r\n%sConnection: close\r\n\r\n" % HOST)
        assert [body for _, _, body in answers(client.rest())] == [b"GET /a b c ", b"POST /p  abc", b"GET /z  "]


@pytest.mark.parametrize("dispatch", POLICIES)
def test_the_environ_tells_the_truth_about_the_policy(dispatch):
    found = {}

    def application(environ, start_response):
        start_response("200 OK", PLAIN)
        return [repr((environ["wsgi.multithread"], environ["wsgi.multiprocess"], environ["wsgi.run_once"])).encode()]

    with serving(application, dispatch) as server:
        found = get(server).rpartition(b"\r\n\r\n")[2]
    threads = dispatch in ("greenlet", "pool", "thread")
    assert found == repr((threads, dispatch == "fork", False)).encode()


def test_the_environ_of_a_request():
    with serving(shown) as server:
        environ = fields_of(
            get(
                server,
                b"/caf%C3%A9/x%2Fy?q=%20",
                b"Cookie: a=1\r\nCookie: b=2\r\nX-A: 1\r\nX-A: 2\r\nX_A: spoofed\r\nProxy: evil\r\n"
                b"Content-Type: a/b\r\n",
            )
        )
        host, port = server.server_address
    assert environ["PATH_INFO"] == "/caf\xc3\xa9/x/y"
    assert environ["QUERY_STRING"] == "q=%20"
    assert environ["REQUEST_URI"] == "/caf%C3%A9/x%2Fy?q=%20"
    assert environ["HTTP_COOKIE"] == "a=1; b=2"
    assert environ["HTTP_X_A"] == "1,2"
    assert environ["CONTENT_TYPE"] == "a/b"
    assert (environ["SERVER_NAME"], environ["SERVER_PORT"]) == (host, str(port))
    assert environ["REMOTE_ADDR"] == "127.0.0.1"
    assert environ["REMOTE_PORT"].isdecimal()
    assert environ["SERVER_PROTOCOL"] == "HTTP/1.1"
    assert environ["wsgi.url_scheme"] == "http"
    assert environ["SCRIPT_NAME"] == ""
    assert re.fullmatch(r"[0-9a-f]{8}-\d+", environ["reqtable.request_id"])
    assert "HTTP_PROXY" not in environ


def test_a_whole_uri_is_a_path():
    assert path_and_query(parse_head(b"GET /a?b?c HTTP/1.0\r\n\r\n")) == ("/a", "b?c")
    with serving(shown) as server:
        assert fields_of(get(server, b"http://x/a?b"))["PATH_INFO"] == "/a"
        assert fields_of(get(server, b"*", method=b"OPTIONS"))["PATH_INFO"] == "*"


def test_the_prefix_is_the_script_name():
    with serving(shown, prefix="/app") as server:
        environ = fields_of(get(server, b"/app/x"))
        assert (environ["SCRIPT_NAME"], environ["PATH_INFO"]) == ("/app", "/x")
        assert fields_of(get(server, b"/app"))["PATH_INFO"] == ""
        assert get(server, b"/apple").startswith(b"HTTP/1.1 404 ")
        assert get(server, b"/").startswith(b"HTTP/1.1 404 ")


# -- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dispatch", POLICIES)
def test_a_generator_is_sent_in_chunks_and_closed_once(dispatch):
    closed = []

    class Items:
        def __iter__(self):
            yield b""
            yield b"one"
            yield b"two"

        def close(self):
            closed.append(1)

    def application(environ, start_response):
        start_response("200 OK", PLAIN)
        return Items()

    with serving(application, dispatch) as server:
        assert get(server).endswith(b"\r\n\r\n3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n")
        assert get(server, version=b"1.0").endswith(b"Connection: close\r\n\r\nonetwo")
        head = get(server, method=b"HEAD")
        assert head.endswith(b"\r\n\r\n")
        wait_until(server, lambda: not len(server.table))
    assert len(closed) == (0 if dispatch == "fork" else 3)


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "pool", "thread"])
def test_an_item_leaves_before_the_next_is_asked_for(dispatch):
    gate = threading.Event()

    def application(environ, start_response):
        start_response("200 OK", PLAIN)
        yield b"first"
        assert gate.wait(10)
        yield b"second"

    with serving(application, dispatch) as server, Client(server.server_address) as client:
        client.send(b"GET / HTTP/1.1\r\n%s\r\n" % HOST)
        seen = b""
        while not seen.endswith(b"first\r\n"):
            seen += client.receive(1)
        gate.set()
        assert client.receive(len(b"6\r\nsecond\r\n0\r\n\r\n")) == b"6\r\nsecond\r\n0\r\n\r\n"


@pytest.mark.parametrize("dispatch", POLICIES)
def test_write_comes_before_the_iterable(dispatch):
    def application(environ, start_response):
        write = start_response("200 OK", [*PLAIN, ("Content-Length", "6")])
        write(b"ab")
        write(b"cd")
        return [b"ef"]

    with serving(application, dispatch) as server:
        assert get(server).endswith(b"\r\n\r\nabcdef")


@pytest.mark.parametrize("dispatch", POLICIES)
def test_a_file_is_sent_from_its_place(dispatch, tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 3 + b"y" * 300_000)
    opened = []

    def application(environ, start_response):
        file = (tmp_path / "file").open("rb")
        opened.append(file)
        file.seek(3)
        start_response("200 OK", PLAIN)
        return environ["wsgi.file_wrapper"](file, 8192)

    with serving(application, dispatch) as server:
        _, fields, body = answers(get(server))[0]
        assert fields["content-length"] == "300000"
        assert body == b"y" * 300_000
        assert answers(get(server, method=b"HEAD"))[0][1]["content-length"] == "300000"
        wait_until(server, lambda: not len(server.table))
    assert all(each.closed for each in opened)


def test_what_is_no_plain_file_is_read_in_blocks():
    def application(environ, start_response):
        start_response("200 OK", PLAIN)
        return environ["wsgi.file_wrapper"](io.BytesIO(b"abcde"), 2)

    with serving(application) as server:
        assert get(server).endswith(b"\r\n\r\n2\r\nab\r\n2\r\ncd\r\n1\r\ne\r\n0\r\n\r\n")


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
def test_these_have_no_body(status):
    def application(environ, start_response):
        start_response(status, [("Content-Length", "0")])
        return [b"dropped"]

    with serving(application) as server:
        answer = get(server)
        assert answer.startswith(b"HTTP/1.1 %s\r\n" % status.encode())
        assert answer.endswith(b"\r\n\r\n")
        assert b"chunked" not in answer
        assert (b"Content-Length" in answer) is (status[:3] == "304")


@pytest.mark.parametrize("dispatch", POLICIES)
def test_a_body_that_is_too_long_is_cut(dispatch, caplog):
    def application(environ, start_response):
        start_response("200 OK", [*PLAIN, ("Content-Length", "3")])
        return [b"ab", b"cdef"]

    with serving(application, dispatch) as server:
        assert get(server).endswith(b"\r\n\r\nabc")
    assert dispatch == "fork" or "longer than its Content-Length" in caplog.text


@pytest.mark.parametrize("dispatch", ["inline", "pool"])
def test_a_body_that_is_too_short_closes_the_connection(dispatch, caplog):
    def application(environ, start_response):
        start_response("200 OK", [*PLAIN, ("Content-Length", "3")])
        return [b"ab"]

    with serving(application, dispatch) as server, Client(server.server_address) as client:
        client.send(b"GET / HTTP/1.1\r\n%s\r\n" % HOST)
        assert client.rest().endswith(b"\r\n\r\nab")
    assert "1 bytes shorter than its Content-Length" in caplog.text


# -- failures ---------------------------------------------------------------------------------------------------------


def raises(environ, start_response):
    raise ValueError("it fails")


def raises_after_start(environ, start_response):
    start_response("200 OK", PLAIN)
    raise ValueError("it fails")


def raises_in_list(environ, start_response):
    start_response("200 OK", PLAIN)
    return [b"x", "no bytes"]


def never_starts(environ, start_response):
    return [b"x"]


def never_starts_nor_sends(environ, start_response):
    return []


def exits(environ, start_response):
    raise SystemExit(3)


def starts_twice(environ, start_response):
    start_response("200 OK", PLAIN)
    start_response("200 OK", PLAIN)
    return [b"x"]


def splits(environ, start_response):
    start_response("200 OK", [("X", "a\r\nSet-Cookie: evil=1")])
    return [b"x"]


def splits_by_name(environ, start_response):
    start_response("200 OK", [("X: a\r\nSet-Cookie", "evil=1")])
    return [b"x"]


def splits_by_status(environ, start_response):
    start_response("200 OK\r\nSet-Cookie: evil=1", PLAIN)
    return [b"x"]


def goes_beyond_latin(environ, start_response):
    start_response("200 OK", [("X", "\u20ac")])
    return [b"x"]


def hops(environ, start_response):
    start_response("200 OK", [("Transfer-Encoding", "chunked")])
    return [b"x"]


def has_two_lengths(environ, start_response):
    start_response("200 OK", [("Content-Length", "1"), ("content-length", "2")])
    return [b"x"]


def informs(environ, start_response):
    start_response("100 Continue", [])
    return []


FAILING = [
    raises, raises_after_start, raises_in_list, never_starts, never_starts_nor_sends, exits, starts_twice, splits,
    splits_by_name, splits_by_status, goes_beyond_latin, hops, has_two_lengths, informs,
]  # fmt: skip


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "pool"])
@pytest.mark.parametrize("application", FAILING, ids=lambda each: each.__name__)
def test_an_application_that_fails_before_its_head_is_answered_with_500(dispatch, application, caplog):
    with serving(application, dispatch) as server, Client(server.server_address) as client:
        client.send(b"GET /a HTTP/1.1\r\n%s\r\n" % HOST)
        client.send(b"GET /b HTTP/1.1\r\n%sConnection: close\r\n\r\n" % HOST)
        data = client.rest()
        assert [status for status, _, _ in answers(data)] == [500, 500]
        assert b"evil" not in data
    assert " 127.0.0.1 GET /a: " in caplog.text


@pytest.mark.parametrize("dispatch", ["thread", "fork"])
def test_one_that_fails_elsewhere_is_answered_with_500(dispatch):
    with serving(raises, dispatch) as server:
        assert get(server).startswith(b"HTTP/1.1 500 ")


@pytest.mark.parametrize("dispatch", POLICIES)
def test_an_application_that_fails_after_its_head_closes_the_connection(dispatch):
    def application(environ, start_response):
        start_response("200 OK", PLAIN)
        yield b"x"
        raise ValueError("it fails")

    with serving(application, dispatch) as server, Client(server.server_address) as client:
        client.send(b"GET / HTTP/1.1\r\n%s\r\n" % HOST)
        data = client.rest()
        # A thread may have failed before the loop has sent the first piece.
        assert data.startswith(b"HTTP/1.1 200 ") or (dispatch == "pool" and data.startswith(b"HTTP/1.1 500 "))
        assert not data.endswith(b"0\r\n\r\n")


def test_exc_info_replaces_an_answer_that_has_not_left():
    import sys

    def application(environ, start_response):
        start_response("200 OK", PLAIN)
        try:
            raise ValueError("late")
        except ValueError:
            start_response("503 Busy", PLAIN, sys.exc_info())
        return [b"busy"]

    with serving(application) as server:
        assert get(server).startswith(b"HTTP/1.1 503 Busy\r\n")


@pytest.mark.parametrize("dispatch", ["inline", "pool"])
def test_exc_info_raises_once_the_answer_has_left(dispatch, caplog):
    import sys

    def application(environ, start_response):
        start_response("200 OK", PLAIN)
        yield b"x"
        try:
            raise ValueError("late")
        except ValueError:
            start_response("503 Busy", PLAIN, sys.exc_info())

    with serving(application, dispatch) as server:
        get(server)
        wait_until(server, lambda: not len(server.table))
    assert "ValueError: late" in caplog.text


def test_close_that_fails_is_logged(caplog):
    class Items(list):
        def close(self):
            raise ValueError("close fails")

    def application(environ, start_response):
        start_response("200 OK", [*PLAIN, ("Content-Length", "1")])
        return Items([b"x"])

    with serving(application) as server:
        assert get(server).endswith(b"x")
    assert "close fails" in caplog.text


# -- bodies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dispatch", POLICIES)
def test_a_long_body_is_kept_in_a_file(dispatch):
    def application(environ, start_response):
        body = environ["wsgi.input"]
        kind = type(body).__name__
        data = body.read()
        start_response("200 OK", PLAIN)
        return [f"{kind} {len(data)} {data.count(b'z')}".encode()]

    with serving(application, dispatch) as server, Client(server.server_address) as client:
        data = b"z" * 1_000_000
        client.send(b"POST / HTTP/1.1\r\n%sContent-Length: %d\r\nConnection: close\r\n\r\n" % (HOST, len(data)) + data)
        assert client.rest().endswith(b"BufferedRandom 1000000 1000000")


def test_a_body_above_the_limit_is_refused():
    with serving(echo, body_bytes_max=1000) as server, Client(server.server_address) as client:
        client.send(b"POST / HTTP/1.1\r\n%sContent-Length: 1001\r\n\r\n" % HOST)
        assert client.rest().startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("dispatch", ["inline", "pool"])
def test_a_slow_reader_holds_no_thread(dispatch):
    """A client that does not read 10 MB, and one thread: the others are answered."""
    entered = []

    def application(environ, start_response):
        entered.append(environ["PATH_INFO"])
        start_response("200 OK", PLAIN)
        if environ["PATH_INFO"] != "/large":
            return [b"quick"]
        return (b"x" * 100_000 for _ in range(100))

    with serving(application, dispatch, size=1) as server, Client(server.server_address) as slow:
        slow.send(b"GET /large HTTP/1.1\r\n%sConnection: close\r\n\r\n" % HOST)
        wait_until(server, lambda: any(entry.state.name == "WRITING" for entry in server.table))
        for _ in range(20):
            assert get(server).endswith(b"quick")
        held = max(entry.output.held for entry in server.table)
        assert held <= 1_000_000
        assert len(slow.rest()) > 10_000_000


def test_a_single_large_item_waits_for_its_client():
    def application(environ, start_response):
        start_response("200 OK", [*PLAIN, ("Content-Length", "10000000")])
        return [b"x" * 10_000_000]

    with serving(application, size=1) as server, Client(server.server_address) as client:
        client.send(b"GET / HTTP/1.1\r\n%sConnection: close\r\n\r\n" % HOST)
        assert client.rest().endswith(b"x" * 1000)


# -- what else the loop does ------------------------------------------------------------------------------------------


def test_health_is_answered_while_every_thread_is_busy():
    gate = threading.Event()
    entered = threading.Event()

    def application(environ, start_response):
        entered.set()
        assert gate.wait(20)
        start_response("200 OK", PLAIN)
        return [b"late"]

    with serving(application, size=1, health_path="/healthz") as server, Client(server.server_address) as busy:
        busy.send(b"GET / HTTP/1.1\r\n%sConnection: close\r\n\r\n" % HOST)
        assert entered.wait(20)
        assert get(server, b"/healthz").endswith(b"\r\n\r\nok\n")
        gate.set()
        assert busy.rest().endswith(b"late")


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "pool"])
def test_what_a_request_needed_is_freed_without_the_garbage_collector(dispatch):
    def calls():
        return sum(type(each) is ApplicationCall for each in gc.get_objects())

    with serving(echo, dispatch) as server:
        gc.collect()
        gc.disable()
        try:
            for _ in range(3):
                assert b"GET / " in get(server)
            wait_until(server, lambda: not calls())
        finally:
            gc.enable()


def test_a_silent_application_is_answered_with_504_and_a_waiting_one_with_503(caplog):
    gate = threading.Event()
    ended = threading.Event()

    def application(environ, start_response):
        gate.wait(20)
        assert environ["reqtable.disconnected"]()
        start_response("200 OK", PLAIN)
        ended.set()
        return [b"late"]

    with serving(application, size=1, timeout_s=0.1) as server:
        with Client(server.server_address) as first:
            first.send(b"GET /1 HTTP/1.1\r\n%s\r\n" % HOST)
            assert first.rest().startswith(b"HTTP/1.1 504 ")
        assert get(server, b"/2").startswith(b"HTTP/1.1 503 ")
        gate.set()
        assert ended.wait(20)
        wait_until(server, lambda: not len(server.table))
    assert "GET /1: the application was silent for 0.1 s" in caplog.text
    assert "GET /2: no thread was free for 0.1 s" in caplog.text


def test_a_greenlet_is_cancelled_at_the_deadline():
    unwound = []

    def application(environ, start_response):
        try:
            time.sleep(30)
        finally:
            unwound.append(1)
        return []

    with serving(application, "greenlet", timeout_s=0.1) as server:
        assert get(server).startswith(b"HTTP/1.1 504 ")
    assert unwound == [1]


def test_a_child_is_interrupted_at_the_deadline():
    def application(environ, start_response):
        time.sleep(30)
        return []

    with serving(application, "fork", timeout_s=0.2) as server:
        assert get(server).startswith(b"HTTP/1.1 504 ")


def test_greenlets_wait_side_by_side():
    """Ten applications wait for each other on one thread: none could go on if one of them held the loop."""
    left, right = socket.socketpair()
    waiting = []

    def application(environ, start_response):
        waiting.append(1)
        if len(waiting) == 10:
            left.send(b"x" * 10)
        data = right.recv(1)
        start_response("200 OK", PLAIN)
        return [data]

    with left, right, serving(application, "greenlet") as server:
        clients = [Client(server.server_address) for _ in range(10)]
        for each in clients:
            each.send(b"GET / HTTP/1.1\r\n%sConnection: close\r\n\r\n" % HOST)
        assert [each.rest()[-1:] for each in clients] == [b"x"] * 10
        for each in clients:
            each.close()


@pytest.mark.parametrize("how", ["reset", "end"])
def test_an_application_is_told_that_its_client_has_gone(how):
    told = threading.Event()
    entered = threading.Event()

    def application(environ, start_response):
        entered.set()
        while not environ["reqtable.disconnected"]():
            time.sleep(0.001)
        told.set()
        start_response("200 OK", PLAIN)
        return [b"nobody"]

    with serving(application) as server:
        client = Client(server.server_address)
        client.send(b"GET / HTTP/1.1\r\n%s\r\n" % HOST)
        assert entered.wait(20)
        getattr(client, how)()
        assert told.wait(20)
        client.close()
        wait_until(server, lambda: not len(server.table))


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "pool"])
def test_close_is_called_when_the_client_leaves(dispatch):
    closed = threading.Event()

    class Items:
        def __iter__(self):
            return self

        def __next__(self):
            return b"x" * 100_000

        def close(self):
            closed.set()

    def application(environ, start_response):
        start_response("200 OK", PLAIN)
        return Items()

    with serving(application, dispatch) as server:
        client = Client(server.server_address)
        client.send(b"GET / HTTP/1.1\r\n%s\r\n" % HOST)
        client.receive(10_000)
        wait_until(server, lambda: any(entry.state.name == "WRITING" for entry in server.table))
        client.reset()
        assert closed.wait(20)
        wait_until(server, lambda: not len(server.table))


# -- proxies ----------------------------------------------------------------------------------------------------------

LOCAL = (ipaddress.ip_network("127.0.0.0/8"),)
FORWARDED = (
    b"X-Forwarded-For: 6.6.6.6, 203.0.113.9, 127.0.0.2\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: example.org\r\n"
    b"X-Forwarded-Port: 8443\r\nForwarded: for=9.9.9.9;proto=http;host=evil.example\r\n"
)


def test_a_trusted_proxy_names_its_client():
    with serving(shown, trusted=LOCAL) as server:
        environ = fields_of(get(server, fields=FORWARDED))
    assert environ["REMOTE_ADDR"] == "203.0.113.9"
    assert environ["wsgi.url_scheme"] == "https"
    assert environ["HTTP_HOST"] == "example.org"
    assert environ["HTTP_X_FORWARDED_PORT"] == "8443"  # the application may have a use for it
    assert "HTTP_FORWARDED" not in environ


def test_any_other_client_is_not_believed():
    with serving(shown, trusted=(ipaddress.ip_network("192.0.2.0/24"),)) as server:
        environ = fields_of(get(server, fields=FORWARDED))
    assert environ["REMOTE_ADDR"] == "127.0.0.1"
    assert environ["wsgi.url_scheme"] == "http"
    assert not [each for each in environ if "FORWARDED" in each]


def test_without_proxies_the_fields_are_the_applications_affair():
    with serving(shown) as server:
        environ = fields_of(get(server, fields=FORWARDED))
    assert environ["REMOTE_ADDR"] == "127.0.0.1"
    assert environ["HTTP_X_FORWARDED_PROTO"] == "https"


@pytest.mark.parametrize(
    ("text", "client", "scheme", "host"),
    [
        ('for="[2001:db8::1]:4711";proto=https;host="a.example:8"', "2001:db8::1", "https", "a.example:8"),
        ("for=198.51.100.1, for=127.0.0.1", "198.51.100.1", "http", "x"),
        ("for=unknown", "127.0.0.1", "http", "x"),
        ('for="', "127.0.0.1", "http", "x"),
        ("for=1.2.3.4;host=a/b", "1.2.3.4", "http", "x"),
    ],
)
def test_forwarded(text, client, scheme, host):
    environ = {
        "REMOTE_ADDR": "127.0.0.1", "wsgi.url_scheme": "http", "HTTP_HOST": "x", "HTTP_FORWARDED": text,
        "HTTP_X_FORWARDED_FOR": "6.6.6.6", "HTTP_X_FORWARDED_PORT": "8443",
    }  # fmt: skip
    believe(environ, "forwarded", LOCAL)
    assert (environ["REMOTE_ADDR"], environ["wsgi.url_scheme"], environ["HTTP_HOST"]) == (client, scheme, host)
    assert not {"HTTP_X_FORWARDED_FOR", "HTTP_X_FORWARDED_PORT"} & environ.keys()


# -- frameworks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dispatch", POLICIES)
def test_flask(dispatch):
    import flask

    app = flask.Flask("small")

    @app.post("/echo/<name>")
    def echo_form(name):
        return flask.jsonify(name=name, form=flask.request.form["a"], url=flask.request.url)

    @app.get("/stream")
    def stream():
        return flask.Response((f"{i}\n" for i in range(3)), mimetype="text/plain")

    with serving(app, dispatch) as server, Client(server.server_address) as client:
        client.send(
            b"POST /echo/caf%C3%A9 HTTP/1.1\r\nHost: example.org\r\nContent-Length: 3\r\nConnection: close\r\n"
            b"Content-Type: application/x-www-form-urlencoded\r\n\r\na=b"
        )
        status, _, body = answers(client.rest())[0]
        assert status == 200
        assert flask.json.loads(body) == {"name": "café", "form": "b", "url": "http://example.org/echo/café"}
        assert get(server, b"/stream").endswith(b"2\r\n0\n\r\n2\r\n1\n\r\n2\r\n2\n\r\n0\r\n\r\n")
        assert get(server, b"/none").startswith(b"HTTP/1.1 404 NOT FOUND\r\n")


@pytest.mark.parametrize("dispatch", POLICIES)
def test_django(dispatch):
    from django.conf import settings
    from django.core.handlers.wsgi import WSGIHandler as Django
    from django.http import JsonResponse
    from django.urls import path

    def view(request):
        return JsonResponse({"path": request.path, "q": request.GET.get("q"), "body": len(request.body)})

    if not settings.configured:
        settings.configure(ALLOWED_HOSTS=["*"], ROOT_URLCONF=(), SECRET_KEY="x", DEBUG=False, LOGGING_CONFIG=None)
    import django
    from django.test.utils import override_settings

    django.setup()
    with (
        override_settings(ROOT_URLCONF=(path("a/", view),), ALLOWED_HOSTS=["*"]),
        serving(Django(), dispatch) as server,
    ):
        with Client(server.server_address) as client:
            client.send(b"POST /a/?q=1 HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc")
            data = client.rest()
        assert data.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b'{"path": "/a/", "q": "1", "body": 3}' in data


def test_settings_are_checked():
    with pytest.raises(TypeError, match="no setting 'colour'"):
        wsgi_handler(echo, colour="red")
    with served(wsgi_handler(echo)) as server:
        assert get(server).startswith(b"HTTP/1.1 200 ")
