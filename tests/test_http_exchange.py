"""HTTP without sockets: keep-alive, early answers, what an answer may be, deadlines, forms, events, the access log."""

from __future__ import annotations

import json
import logging
import re
from http import HTTPStatus
from typing import Any, ClassVar

import pytest

from reqtable import Limits, StateRequestHandler, connect, flushed, format_rows, line, sleep, state, told
from reqtable.http import BadRequest, HTTPRequestHandler, encode_event, route
from reqtable.server.access_log import JSONFormatter
from reqtable.table.errors import HandlerError
from reqtable.testing import exercise
from tests.test_http import answers

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = b"POST /%b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


class Plain(HTTPRequestHandler):
    server_name = None

    def do_GET(self) -> Any:
        return self.answer(200, f"{self.request.path}\n")

    def do_POST(self) -> Any:
        return self.answer(200, self.request.body)


def took(client: Any) -> bytes:
    """Take all output that has arrived."""
    data: bytes = client.output
    client.expect(data)
    return data


def statuses(data: bytes) -> list[int]:
    return [int(each) for each in re.findall(rb"HTTP/1\.1 (\d+) ", data)]


def post(body: bytes, path: bytes = b"", fields: bytes = b"") -> bytes:
    return b"POST /%b HTTP/1.1\r\nHost: x\r\n%bContent-Length: %d\r\n\r\n%b" % (path, fields, len(body), body)


# -- what the client sees of a connection -----------------------------------------------------------------------------


def test_a_bad_second_request_is_refused_after_the_first_is_answered():
    client = exercise(Plain).send(GET + b"GET / HTTP/1.1\r\n\r\n")
    assert statuses(took(client)) == [200, 400]
    client.expect_end()


@pytest.mark.parametrize(
    ("request_line", "host", "expected"),
    [
        (b"GET /a?b#c HTTP/1.1", b"x", 400),
        (b"GET http://y/a?b HTTP/1.1", b"x", 200),
        (b"GET http://u@y/a HTTP/1.1", b"x", 400),
        (b"GET ftp://y/a HTTP/1.1", b"x", 400),
        (b"GET a HTTP/1.1", b"x", 400),
        (b"GET * HTTP/1.1", b"x", 400),
        (b"OPTIONS * HTTP/1.1", b"x", 204),
        (b"CONNECT x:1 HTTP/1.1", b"x:1", 501),
        (b"GET / HTTP/1.1", b"", 200),
        (b"GET / HTTP/1.1", b"[::1]:80", 200),
        (b"GET / HTTP/1.1", b"a b", 400),
        (b"GET / HTTP/1.1", b"a/b", 400),
        (b"GET / HTTP/1.1", b"a@b", 400),
        (b"GET / HTTP/1.1", b"a%zz", 400),
        (b"GET / HTTP/1.1", b"x\r\nHost: x", 400),
        (b"GET / HTTP/1.0", b"x\r\nHost: y", 400),
        (b"GET / HTTP/1.2", b"x", 505),
        (b"GET /\xc3\xa9 HTTP/1.1", b"x", 400),
    ],
)
def test_targets_and_hosts(request_line: bytes, host: bytes, expected: int) -> None:
    assert statuses(exercise(Plain).send(b"%b\r\nHost: %b\r\n\r\n" % (request_line, host)).output) == [expected]


def test_an_absolute_target_says_which_host_is_meant():
    class Shows(Plain):
        def do_GET(self) -> Any:
            return self.answer(200, f"{self.request.get('host')} {self.request.path} {self.request.query}")

    for target, expected in [(b"http://a:1/b?c", b"a:1 /b c"), (b"HTTP://a?c", b"a / c"), (b"http://a", b"a / ")]:
        [(_, _, body)] = answers(exercise(Shows).send(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % target).output)
        assert body == expected


@pytest.mark.parametrize(
    ("version", "fields", "expected"),
    [
        (b"1.1", b"", None),
        (b"1.1", b"Connection: foo\r\nConnection: bar, Close\r\n", "close"),
        (b"1.0", b"", "close"),
        (b"1.0", b"Connection: Keep-Alive\r\n", "keep-alive"),
        (b"1.0", b"Connection: keep-alive, close\r\n", "close"),
    ],
)
def test_how_long_a_connection_is_kept(version: bytes, fields: bytes, expected: str | None) -> None:
    client = exercise(Plain).send(b"GET / HTTP/%b\r\nHost: x\r\n%b\r\n" % (version, fields))
    [(_, found, _)] = answers(took(client))
    assert found.get("connection") == expected
    assert client.is_over == (expected == "close")


def test_a_bare_lf_and_tls_are_refused_at_once():
    for data in (b"GET / HTTP/1.1\n", b"GET / HTTP/1.1\r\nHost: x\n", b"\x16\x03\x01\x02", b" GET", b"\n"):
        assert statuses(exercise(Plain).send(data).output) == [400], data


def test_empty_lines_before_a_request_are_passed_over():
    client = exercise(Plain)
    for _ in range(3):
        client.send(b"\r\n\r\n\r\n")
    assert statuses(took(client.send(GET + b"\r\n" + GET))) == [200, 200]


def test_an_idle_connection_ends_silently_and_a_begun_request_gets_408():
    limits = Limits(idle_timeout_s=5, read_timeout_s=7)
    exercise(Plain, limits=limits).jump(6).expect(b"").expect_end()
    assert statuses(exercise(Plain, limits=limits).send(b"GET / HT").jump(8).output) == [408]
    assert statuses(exercise(Plain, limits=limits).send(post(b"abc")[:-1]).jump(8).output) == [408]


# -- early answers ----------------------------------------------------------------------------------------------------


class Guarded(Plain):
    def on_head(self) -> Any:
        return self.answer(403) if self.request.path == "/secret" else None


def test_the_rest_of_a_small_body_is_dropped_after_an_early_answer():
    client = exercise(Guarded).send(post(b"x" * 100, b"secret")[:-50])
    [(status, fields, _)] = answers(took(client))
    assert (status, fields.get("connection")) == (403, None)
    client.send(b"x" * 50).expect(b"").send(post(b"ok"))
    assert [body for _, _, body in answers(took(client))] == [b"ok"]


def test_an_early_answer_that_closes_is_the_only_one():
    client = exercise(Guarded).send(b"GET /secret HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert statuses(took(client)) == [403]
    client.expect_end()


def test_chunks_are_dropped_too_but_not_for_ever():
    head = CHUNKED % b"secret"
    client = exercise(Guarded).send(head + b"3\r\nabc\r\n0\r\n\r\n" + GET)
    assert statuses(took(client)) == [403, 200]
    client = exercise(Guarded).send(head)
    assert statuses(took(client)) == [403]
    for _ in range(5):
        client.send(b"10000\r\n" + bytes(65_536) + b"\r\n")
    client.expect(b"").expect_end()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"0x3\r\n", b"the size of a chunk is not a hexadecimal number"),
        (b"3" * 1024, b"the size of a chunk is not a hexadecimal number"),
        (b"3;\r\n", b"the extension of a chunk is not well-formed"),
        (b"3 ; a=\r\n", b"the extension of a chunk is not well-formed"),
        (b"3;" + b"a" * 1024, b"the extension of a chunk is not well-formed"),
    ],
)
def test_a_refused_chunk_says_what_is_wrong(line, reason):
    client = exercise(Plain).send(CHUNKED % b"" + line)
    assert took(client).endswith(b"400 Bad Request: " + reason + b"\n")


def test_after_an_early_answer_to_a_large_body_the_connection_closes():
    head = b"POST /secret HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
    client = exercise(Guarded).send(head)
    [(status, fields, _)] = answers(took(client))
    assert (status, fields["connection"]) == (403, "close")
    client.expect_end()


def test_a_client_that_waits_for_100_gets_the_answer_instead():
    expects = b"Expect: 100-continue\r\n"
    client = exercise(Guarded).send(post(b"x" * 10, b"secret", expects)[:-10])
    [(status, fields, _)] = answers(took(client))
    assert (status, fields["connection"]) == (403, "close")
    client.expect_end()
    client = exercise(Guarded).send(post(b"x" * 10, b"", expects)[:-10]).expect(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert statuses(took(client.send(b"x" * 10))) == [200]
    assert statuses(exercise(Plain).send(b"GET / HTTP/1.1\r\nHost: x\r\nExpect: 200-ok\r\n\r\n").output) == [417]


def test_a_handler_that_waits_before_it_reads_the_body():
    class Slow(Plain):
        def on_head(self) -> Any:
            return (self.go_on, sleep(3)) if self.request.head.has_body else None

        @state()
        def go_on(self, _: None) -> Any:
            return self.read_body()

    client = exercise(Slow).send(post(b"hello", b"", b"Expect: 100-continue\r\n")[:-5]).expect(b"")
    client.jump(4).expect(b"HTTP/1.1 100 Continue\r\n\r\n").send(b"hello")
    assert answers(took(client))[0][2] == b"hello"


def test_a_body_that_is_taken_in_pieces_with_backpressure():
    class Echo(Plain):
        def on_head(self) -> Any:
            self.begin_answer(200)
            return None

        def on_body(self, piece: bytes) -> Any:
            self.write(piece)
            return self.go_on, flushed()

        @state()
        def go_on(self, _: None) -> Any:
            return self.read_body()

        def respond(self) -> Any:
            return self.end_answer()

    client = exercise(Echo)
    client.send(CHUNKED % b"" + b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n" + GET[:4])
    assert took(client).endswith(b"\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")


def test_bodies_above_the_limit():
    class Small(Plain):
        body_bytes_max = 10
        head_bytes_max = 200

    for data in (post(b"x" * 11), CHUNKED % b"" + b"6\r\nabcdef\r\n5\r\n"):
        client = exercise(Small).send(data)
        assert statuses(took(client)) == [413]
        client.expect_end()
    assert statuses(exercise(Small).send(b"GET / HTTP/1.1\r\nA: " + b"x" * 200).output) == [431]
    assert statuses(exercise(Small).send(b"GET /" + b"x" * 200).output) == [414]


# -- what an answer may be --------------------------------------------------------------------------------------------


def serving(function: Any) -> type[Plain]:
    return type("Made", (Plain,), {"do_GET": function})


@pytest.mark.parametrize(
    ("status", "given", "length"),
    [(200, b"x", "1"), (204, b"", None), (204, b"x", None), (304, b"", None), (205, b"x", "0"), (404, b"", "14")],
)
def test_the_length_of_an_answer(status: int, given: bytes, length: str | None) -> None:
    client = exercise(serving(lambda self: self.answer(status, given))).send(GET + GET)
    data = took(client)
    assert statuses(data) == [status, status]
    first = data.partition(b"\r\n\r\n")[0].decode()
    assert re.findall(r"Content-Length: (\d+)", first) == ([] if length is None else [length])


def test_a_304_keeps_the_length_it_is_given():
    made = serving(lambda self: self.answer(304, fields={"Content-Length": "77", "ETag": '"x"'}))
    assert b"Content-Length: 77\r\n" in exercise(made).send(GET).output


def test_a_stream_to_every_kind_of_client():
    def streams(self: Any) -> Any:
        self.begin_answer(200)
        self.write(b"abc")
        self.write(b"")
        return self.end_answer()

    client = exercise(serving(streams)).send(GET)
    assert took(client).endswith(b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
    assert not client.is_over
    client = exercise(serving(streams)).send(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    assert took(client).endswith(b"Connection: close\r\n\r\nabc")
    client.expect_end()
    client = exercise(serving(streams)).send(GET.replace(b"GET", b"HEAD"))
    assert took(client).endswith(b"Transfer-Encoding: chunked\r\n\r\n")
    assert not client.is_over


def test_interim_answers_are_for_http_1_1():
    def hints(self: Any) -> Any:
        self.begin_answer(103, {"Link": "</a.css>; rel=preload"})
        return self.answer(200)

    assert statuses(exercise(serving(hints)).send(GET).output) == [103, 200]
    assert statuses(exercise(serving(hints)).send(b"GET / HTTP/1.0\r\n\r\n").output) == [200]


def sends(*calls: tuple[Any, ...]) -> Any:
    def serve(self: Any) -> Any:
        for name, *given in calls:
            result = getattr(self, name)(*given)
        return result

    return serve


@pytest.mark.parametrize(
    ("calls", "message", "expected"),
    [
        ([("begin_answer", 200, (), 3), ("write", b"abcd")], "longer than its Content-Length, by 1", [200]),
        ([("begin_answer", 200, (), 3), ("write", b"ab"), ("end_answer",)], "shorter than its Content-Length", [200]),
        ([("begin_answer", 200), ("write", b"ab")], "sent part of an answer to GET / and returned None", [200]),
        ([("write", b"ab")], "outside an answer", [500]),
        ([("end_answer",)], "outside an answer", [500]),
        ([("answer", 200), ("end_answer",)], "outside an answer", [200]),
        ([("answer", 200), ("answer", 200)], "answers the same request twice", [200]),
        ([("answer", 102)], "102 is no answer to a request", [500]),
        ([("begin_answer", 200), ("begin_answer", 200)], "answers the same request twice", [200]),
        ([("answer", 200, b"", {"A": "b\r\nC: d"})], "the header field A can't be", [500]),
        ([("answer", 200, b"", {"A:": "b"})], "can't be named 'A:'", [500]),
        ([("answer", 200, b"", {"A": "\u20ac"})], "the header field A can't be", [500]),
        ([("answer", 99)], "from 100 to 999", [500]),
        ([("answer", 200, b"", {"Transfer-Encoding": "gzip"})], "Transfer-Encoding of its own", [500]),
        ([("answer", 200, b"a", {"Content-Length": "2"})], "the Content-Length can't be '2'", [500]),
        ([("begin_answer", 200, (), None, "OK\r\nA: b")], "the reason of an answer can't be", [500]),
        ([("fields",)], "sent no answer to GET / and returned None", [500]),
    ],
)
def test_a_handler_that_breaks_the_rules(calls: list[Any], message: str, expected: list[int]) -> None:
    serve = sends(*calls)
    made = serving(serve) if "returned None" not in message else serving(lambda self: serve(self) and None)
    client = exercise(made)
    with pytest.raises(HandlerError, match=re.escape(message)):
        client.send(GET)
    assert statuses(took(client)) == expected
    client.expect_end()


def test_a_handler_may_forget_to_return_its_answer():
    client = exercise(serving(lambda self: self.answer(200) and None)).send(GET + GET)
    assert statuses(took(client)) == [200, 200]


def test_a_handler_may_raise_bad_request():
    def refuses(self: Any) -> Any:
        raise BadRequest(404, "no such note")

    client = exercise(serving(refuses)).send(GET + GET)
    assert [(status, body) for status, _, body in answers(took(client))] == [
        (404, b"404 Not Found: no such note\n")
    ] * 2


class Notes(HTTPRequestHandler):
    @route("GET", "/notes")
    @route("GET", "/")
    def all_notes(self) -> Any:
        return self.answer(200, "all")

    @route("GET", "/notes/{name}")
    @route("PUT", "/notes/{name}")
    def one_note(self, name: str) -> Any:
        return self.answer(200, f"{self.request.method} {name}")

    @route("POST", "/notes/{name}/lines/{number}")
    def add(self, name: str, number: str) -> Any:
        return self.answer(201, f"{name} {number}")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"GET /", (200, b"all", None)),
        (b"GET /notes?x", (200, b"all", None)),
        (b"GET /notes/a%20%C3%A9%2Fb", (200, "GET a é/b".encode(), None)),
        (b"PUT /notes/a", (200, b"PUT a", None)),
        (b"POST /notes/a/lines/7", (201, b"a 7", None)),
        (b"GET /notes/", (404, b"404 Not Found\n", None)),
        (b"GET /notes/a/b", (404, b"404 Not Found\n", None)),
        (b"DELETE /notes/a", (405, b"405 Method Not Allowed\n", "GET, HEAD, OPTIONS, PUT")),
        (b"OPTIONS /notes/a/lines/7", (204, b"", "OPTIONS, POST")),
        (b"BREW /notes", (501, b"501 Not Implemented\n", None)),
        (b"OPTIONS *", (204, b"", "OPTIONS")),
    ],
)
def test_routes(line: bytes, expected: Any) -> None:
    [(status, fields, body)] = answers(exercise(Notes).send(b"%b HTTP/1.1\r\nHost: x\r\n\r\n" % line).output)
    assert (status, body, fields.get("allow")) == expected


def test_a_method_that_overrides_one_keeps_its_routes():
    class Base(HTTPRequestHandler):
        @route("GET", "/kept")
        def kept(self):
            return self.answer(200, "base")

        @route("GET", "/moved")
        def moved(self):
            return self.answer(200, "base")

        @route("GET", "/gone")
        def gone(self):
            return self.answer(200, "base")

    class Derived(Base):
        gone = None

        def kept(self):
            return self.answer(200, "derived")

        @route("GET", "/elsewhere")
        def moved(self):
            return self.answer(200, "derived")

    for path, status, body in (
        ("kept", 200, b"derived"),
        ("elsewhere", 200, b"derived"),
        ("moved", 404, b""),
        ("gone", 404, b""),
    ):
        output = exercise(Derived).send(f"GET /{path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()).output
        assert output.startswith(b"HTTP/1.1 %d " % status)
        assert output.endswith(body)


def test_routes_that_are_wrong():
    with pytest.raises(HandlerError, match="can't have the path"):
        route("GET", "/{a b}")
    with pytest.raises(HandlerError, match=r"Twice\.other has the route GET / of all_notes"):

        class Twice(Notes):
            @route("GET", "/")
            def other(self) -> Any:
                return self.answer(200)

    head = exercise(Notes).send(b"HEAD /notes HTTP/1.1\r\nHost: x\r\n\r\n").output
    assert statuses(head) == [200]
    assert head.endswith(b"\r\n\r\n")


# -- time -------------------------------------------------------------------------------------------------------------


class Waits(Plain):
    def do_GET(self) -> Any:
        if self.request.path == "/backend":
            return self.connected, connect("tcp://10.0.0.1:1")
        return self.waited, sleep(float(self.request.path[1:]))

    @state()
    def waited(self, _: None) -> Any:
        return self.answer(200)

    @state()
    def connected(self, backend: Any) -> Any:
        return self.answered, backend.line()

    @state()
    def answered(self, text: bytes) -> Any:
        return self.answer(200, text)


def get(path: bytes) -> bytes:
    return b"GET /%b HTTP/1.1\r\nHost: x\r\n\r\n" % path


def test_a_request_that_takes_too_long_gets_503():
    limits = Limits(request_timeout_s=10)
    client = exercise(Waits, limits=limits)
    for _ in range(5):  # each request has its own time, and none runs between them
        client.send(get(b"8")).jump(9)
        assert statuses(took(client)) == [200]
        client.jump(20)
    client.send(get(b"11")).jump(10.5)
    [(status, fields, _)] = answers(took(client))
    assert (status, fields["connection"]) == (503, "close")
    client.expect_end()


def test_a_backend_that_takes_too_long_gives_504_and_one_that_is_away_502():
    client = exercise(Waits, limits=Limits(request_timeout_s=5)).send(get(b"backend"))
    client.accept("tcp://10.0.0.1:1")
    assert statuses(took(client.jump(6))) == [504]
    client = exercise(Waits).send(get(b"backend"))
    with pytest.raises(OSError, match="no route"):
        client.refuse("tcp://10.0.0.1:1", "no route")
    assert statuses(took(client)) == [502]


def test_a_late_body_gives_408_and_a_late_stream_just_ends():
    limits = Limits(request_timeout_s=5, read_timeout_s=60)
    assert statuses(exercise(Plain, limits=limits).send(post(b"abc")[:-1]).jump(6).output) == [408]

    class Streams(Plain):
        def do_GET(self) -> Any:
            self.begin_answer(200)
            self.write(b"abc")
            return self.goes_on

        @state(told())
        def goes_on(self, item: Any) -> Any:
            return self.end_answer()

    client = exercise(Streams, limits=limits).send(GET)
    assert statuses(took(client)) == [200]
    client.jump(6).expect(b"").expect_end()


def test_a_state_that_times_out_gives_503():
    class Patient(Plain):
        def do_GET(self) -> Any:
            return self.waits

        @state(told(), timeout=3)
        def waits(self, item: Any) -> Any:
            return self.answer(200)

    client = exercise(Patient).send(GET).jump(4)
    assert statuses(took(client)) == [503]


# -- forms and events -------------------------------------------------------------------------------------------------


class Forms(Plain):
    def do_POST(self) -> Any:
        form = self.request.form()
        return self.answer(200, repr([(each.name, each.data, each.filename, each.content_type) for each in form]))


def form_of(content_type: bytes, body: bytes) -> Any:
    [(status, _, found)] = answers(exercise(Forms).send(post(body, b"", b"Content-Type: %b\r\n" % content_type)).output)
    return eval(found) if status == 200 else status


def test_forms():
    urlencoded = b"application/x-www-form-urlencoded; charset=utf-8"
    assert form_of(urlencoded, b"a=1&b=%C3%A9+x&a=&c") == [
        ("a", b"1", None, None),
        ("b", "é x".encode(), None, None),
        ("a", b"", None, None),
        ("c", b"", None, None),
    ]
    assert form_of(urlencoded, b"&".join([b"a=1"] * 1001)) == 400
    assert form_of(b"text/plain", b"a=1") == 415


def test_forms_with_files():
    pytest.importorskip("python_multipart")
    body = (
        b'--XX\r\nContent-Disposition: form-data; name="a"\r\n\r\none\r\n'
        b'--XX\r\nContent-Disposition: form-data; name="f"; filename="../x.txt"\r\nContent-Type: text/plain\r\n\r\n'
        b"\x00\r\n--X\r\n--XX--\r\n"
    )
    kind = b"multipart/form-data; boundary=XX"
    assert form_of(kind, body) == [("a", b"one", None, None), ("f", b"\x00\r\n--X", "../x.txt", "text/plain")]
    assert form_of(kind, body[:-8]) == 400
    assert form_of(kind, b"hello") == 400
    assert form_of(b"multipart/form-data", body) == 400
    assert form_of(kind, b"--XX\r\nA: b\r\n\r\none\r\n--XX--\r\n") == 400


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"data": "a\nb\r\nc\rd"}, b"data: a\ndata: b\ndata: c\ndata: d\n\n"),
        ({"data": "x", "event": "e", "id": "1", "retry": 5}, b"event: e\nid: 1\nretry: 5\ndata: x\n\n"),
        ({"event": "ping"}, b"event: ping\ndata: \n\n"),
        ({}, b":\n\n"),
        ({"retry": 5}, b"retry: 5\n\n"),
    ],
)
def test_events_as_bytes(given: dict[str, Any], expected: bytes) -> None:
    assert encode_event(**given) == expected


@pytest.mark.parametrize("given", [{"event": "a\nb"}, {"id": "a\rb"}, {"id": "a\0"}, {"retry": -1}, {"retry": "1"}])
def test_events_that_would_be_others(given: dict[str, Any]) -> None:
    with pytest.raises(HandlerError):
        encode_event("x", **given)


def test_a_stream_of_events():
    class News(Plain):
        def do_GET(self) -> Any:
            self.begin_events()
            return self.listening

        @state(told(), timeout=15)
        def listening(self, item: Any) -> Any:
            self.send_event(item, event="news")
            return self.listening

        def on_timeout(self) -> Any:
            if self.state_name != "listening":
                return super().on_timeout()
            self.send_event()
            return self.listening

    client = exercise(News).send(GET)
    head = took(client)
    assert b"Content-Type: text/event-stream\r\n" in head
    assert b"Cache-Control: no-store\r\n" in head
    client.tell("hello").expect(b"19\r\nevent: news\ndata: hello\n\n\r\n")
    client.jump(16).expect(b"3\r\n:\n\n\r\n")


# -- what is seen of a request ----------------------------------------------------------------------------------------


def test_the_row_of_a_request():
    client = exercise(Waits).send(post(b"abc", b"x")[:-1])
    [row] = client.entry.table.snapshot()
    assert (row["method"], row["path"], row["status"], row["body_in"]) == ("POST", "/x", None, 2)
    client.send(b"c" + get(b"5"))
    [row] = client.entry.table.snapshot()
    assert (row["method"], row["path"], row["status"], row["body_out"]) == ("GET", "/5", None, 0)
    client.jump(6)
    [row] = client.entry.table.snapshot()
    assert (row["method"], row["path"], row["status"]) == (None, None, None)


def test_the_table_shows_what_is_asked_for():
    slow = exercise(Waits).send(get(b"0" * 80 + b"5")).entry.table.snapshot()
    told = exercise(Telling).send(GET).entry.table.snapshot()
    idle = exercise(Plain).entry.table.snapshot()
    other = exercise(Lines).entry.table.snapshot()
    heading, *lines = format_rows(slow + told + idle + other).splitlines()
    at = heading.index("request")
    assert [line[at:].partition("  ")[0] for line in lines] == [
        "GET /" + "0" * 58 + "…",
        "GET / 200",
        "-",
        "-",
    ]
    assert "request" not in format_rows(other)


class Telling(Plain):
    """Begins an answer, and waits."""

    def do_GET(self) -> Any:
        self.begin_answer(200)
        self.write(bytes(1000))
        return self.waiting

    @state(told())
    def waiting(self, text: str) -> Any:
        return self.end_answer()


class Lines(StateRequestHandler):
    @state(line())
    def command(self, text: bytes) -> Any:
        return self.command


def test_a_row_counts_the_bytes_of_a_body_that_were_sent():
    client = exercise(Telling).read_nothing().send(GET)
    [row] = client.entry.table.snapshot()
    assert (row["status"], row["body_out"]) == (200, 0)
    client.read_on()
    [row] = client.entry.table.snapshot()
    assert (row["status"], row["body_out"]) == (200, 1000)


def test_one_line_of_the_access_log_for_each_request(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "reqtable.access")
    client = exercise(Plain)
    client.send(GET + b'GET /a"\\ HTTP/1.1\r\nHost: x\r\nUser-Agent: u"\x85\r\n\r\n').send(b"BAD\r\n\r\n")
    took(client)
    lines = [each.getMessage() for each in caplog.records]
    texts = [re.sub(r"\[.*?\]", "[]", line.partition(" ")[2]).rsplit(" ", 2)[0] for line in lines]
    assert texts == [
        '- - [] "GET / HTTP/1.1" 200 2 "-" "-"',
        '- - [] "GET /a\\x22\\x5C HTTP/1.1" 200 5 "-" "u\\x22\\x85"',
        '- - [] "- / HTTP/1.1" 400 75 "-" "-"',
    ]
    found = [json.loads(JSONFormatter().format(each)) for each in caplog.records]
    assert [each["status"] for each in found] == [200, 200, 400]
    assert len({each["request_id"] for each in found}) == 3
    assert (found[1]["target"], found[1]["bytes_out"], found[1]["is_whole"]) == ('/a"\\', 5, True)


def test_a_client_that_leaves_is_logged_with_what_it_got(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "reqtable.access")
    exercise(Waits).send(get(b"5")).reset()
    [record] = caplog.records
    assert (record.request["status"], record.request["is_whole"]) == (499, False)


# -- what an answer can't be ------------------------------------------------------------------------------------------


class Asked(HTTPRequestHandler):
    """Gives `answer` the arguments of the test."""

    server_name = None
    args: ClassVar[tuple[Any, ...]] = ()
    named: ClassVar[dict[str, Any]] = {}

    def do_GET(self) -> Any:
        return self.answer(*self.args, **self.named)


JSON = "application/json"


@pytest.mark.parametrize(
    ("args", "named", "types", "body"),
    [
        ((200, "{}", {"Content-Type": JSON}), {}, [JSON], b"{}"),
        ((200, "{}", [("content-type", JSON)]), {"content_type": "text/html"}, [JSON], b"{}"),
        ((200, b"{}", {"Content-Type": JSON}), {"content_type": "text/html"}, [JSON], b"{}"),
        ((200, b"{}"), {"content_type": JSON}, [JSON], b"{}"),
        ((404, "", {"Content-Type": JSON}), {}, [JSON], b""),
        ((404,), {}, ["text/plain; charset=utf-8"], b"404 Not Found\n"),
        ((200, bytearray(b"{}")), {}, [], b"{}"),
        ((HTTPStatus.OK, memoryview(b"{}")), {}, [], b"{}"),
    ],
)
def test_an_answer_has_one_content_type(args: Any, named: Any, types: list[str], body: bytes) -> None:
    data = took(exercise(type("Asks", (Asked,), {"args": args, "named": named})).send(GET))
    assert re.findall(r"(?im)^content-type: ([^\r]*)", data.decode()) == types
    assert data.partition(b"\r\n\r\n")[2] == body


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((200, {"a": 1}), r"answer\(\) can't send \{'a': 1\}: give bytes or text, as by json.dumps\(…\), or leave"),
        ((200, None), r"answer\(\) can't send None"),
        ((404, None), r"answer\(\) can't send None"),
        (("200 OK",), "the status of an answer is a number from 100 to 999, not '200 OK'"),
        (([200], "x"), r"the status of an answer is a number from 100 to 999, not \[200\]"),
        ((200.0, "x"), "not 200.0"),
        ((200, "x", {"Age": 5}), r"the header field Age can't be 5: give text, as by str\(5\)"),
        ((200, "x", {"Age": b"5"}), r"the header field Age can't be b'5': give text, as by b'5'.decode\(\)"),
        ((200, "x", {5: "x"}), "a header field can't be named 5"),
        ((200, "x", "Age: 5"), "header fields are a mapping, or pairs of texts, not 'Age: 5'"),
        ((200, "x", ["Age: 5"]), "header fields are a mapping, or pairs of texts"),
        ((200, "x", [(["Age"], "5")]), r"a header field can't be named \['Age'\]"),
        ((200, "x", [["Age", ["5"]]]), r"the header field Age can't be \['5'\]"),
        ((200, bytes(70_000)), r"an answer of 70000 bytes is more than the output takes \(66000 bytes\): send it in"),
    ],
)
def test_an_answer_that_cannot_be_sent_is_refused_before_its_head_is_sent(args: Any, said: str) -> None:
    limits = Limits(output_bytes_max=66_000, high_water_bytes=1000)
    client = exercise(type("Asks", (Asked,), {"args": args}), limits=limits)
    with pytest.raises(HandlerError, match=said):
        client.send(GET)
    assert statuses(took(client)) == [500]


@pytest.mark.parametrize("piece", ["text", None, "", 5])
def test_a_piece_of_an_answer_is_of_bytes(piece: Any) -> None:
    class Writes(HTTPRequestHandler):
        def do_GET(self) -> Any:
            self.begin_answer(200)
            self.write(piece)
            return self.end_answer()

    with pytest.raises(HandlerError, match=r"write\(\) can't send .*: give bytes, as by text.encode\(\)"):
        exercise(Writes).send(GET)


def test_the_fields_of_an_answer_stay_the_callers() -> None:
    given = [("A", "b")]
    for _ in range(2):
        took(exercise(type("Asks", (Asked,), {"args": (200, "text", given)})).send(GET))
    assert given == [("A", "b")]
