"""The methods that answer HTTP requests: what they may return, and what an error says of them."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest

import reqtable
from reqtable import HandlerError, InvalidTransition, Transition, nothing, state
from reqtable.dispatch import check_servable
from reqtable.http import AsyncWebSocketHandler, HTTPRequestHandler, WebSocketHandler, route, ws_message, wsgi_handler
from reqtable.http.frames import CLOSE, INTERNAL_ERROR, close_payload
from reqtable.table.errors import ConfigurationError
from reqtable.testing import exercise
from tests.support import Client, served
from tests.test_http_exchange import GET, Plain, statuses, took
from tests.test_websocket import opened, said
from tests.websockets_by_hand import text

HERE = r"\(.*test_http_methods\.py:\d+\)"


class Wrong(Plain):
    """Returns what is no transition, in each place where a method of the author's returns one."""

    @route("GET", "/text/{name}")
    def s(self, name: str) -> Any:
        return name

    @route("GET", "/pair")
    def pair(self) -> Any:
        return ("a", 5)

    @route("GET", "/no-want")
    def no_want(self) -> Any:
        return self.asked, 5

    @route("GET", "/no-state")
    def no_state(self) -> Any:
        return self.answer

    @route("GET", "/want")
    def want(self) -> Any:
        return nothing()

    @route("GET", "/later")
    def later(self) -> Any:
        return self.asked

    @route("GET", "/nothing")
    def silent(self) -> Any:
        return None

    @route("GET", "/head")
    @route("POST", "/body")
    def good(self) -> Any:
        return self.answer(200)

    def on_head(self) -> Any:
        return 5 if self.request.path == "/head" else None

    def on_body(self, piece: bytes) -> Any:
        return [piece] if self.request.path == "/body" else super().on_body(piece)

    def do_DELETE(self) -> Any:
        return b"gone"

    def do_PUT(self) -> Any:
        return Plain(self.entry).head

    @state(nothing())
    def asked(self, _: None) -> Any:
        found = {"a": 1}
        return found


@pytest.mark.parametrize(
    ("request_line", "message"),
    [
        (b"GET /text/asked", r"Wrong\.s returned the string 'asked': return self\.asked"),
        (b"GET /text/hi", r"Wrong\.s returned 'hi': return self\.answer\(…\), self\.end_answer\(\), or the state"),
        (b"GET /want", r"Wrong\.want returned nothing\(\) in place of a state: return self\.asked, nothing\(\)"),
        (b"HEAD /text/hello", r"Wrong\.s returned 'hello'"),
        (b"GET /pair", r"Wrong\.pair returned \('a', 5\)"),
        (b"GET /no-want", r"Wrong\.no_want returned 5 as the want of asked"),
        (b"GET /no-state", r"Wrong\.no_state returned self\.answer, which is no state"),
        (b"GET /later", r"Wrong\.asked returned \{'a': 1\}"),
        (b"GET /head", r"Wrong\.on_head returned 5"),
        (b"POST /body", r"Wrong\.on_body returned \[b'x'\]"),
        (b"DELETE /x", r"Wrong\.do_DELETE returned b'gone'"),
        (b"PUT /x", r"Wrong\.do_PUT returned .*which is not this request's"),
    ],
)
def test_a_wrong_return_value_is_answered_by_500_and_names_the_method(request_line: bytes, message: str) -> None:
    body = b"Content-Length: 1\r\n\r\nx" if request_line.startswith(b"POST") else b"\r\n"
    client = exercise(Wrong)
    with pytest.raises(InvalidTransition, match=f"^{message}.*{HERE}") as caught:
        client.send(request_line + b" HTTP/1.1\r\nHost: x\r\n" + body)
    assert statuses(took(client)) == [500]
    assert caught.value.__notes__ == [f"while answering {request_line.decode()}"]


def test_an_overridden_respond_and_on_error_are_named() -> None:
    class Responds(HTTPRequestHandler):
        def respond(self) -> Any:
            return 5

    client = exercise(Responds)
    with pytest.raises(InvalidTransition, match=rf"Responds\.respond returned 5.*{HERE}"):
        client.send(GET)
    assert statuses(took(client)) == [500]

    class Handles(Plain):
        def do_GET(self) -> Any:
            raise ValueError("it fails")

        def on_error(self, error: Exception) -> Any:
            found = "error"
            return found

    with pytest.raises(InvalidTransition, match=rf"Handles\.on_error returned 'error'.*{HERE}"):
        exercise(Handles).send(GET)


def test_a_method_that_returns_none_is_named_with_its_request() -> None:
    client = exercise(Wrong)
    with pytest.raises(HandlerError, match=rf"Wrong\.silent sent no answer to GET /nothing and .*{HERE}"):
        client.send(b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n")
    assert statuses(took(client)) == [500]


def test_the_log_names_the_request_that_failed(caplog: pytest.LogCaptureFixture) -> None:
    class Fails(Wrong):
        def do_GET(self) -> Any:
            raise ValueError("it fails")

    with served(Fails) as server:
        for path in (b"/a%5Cb?c", b"/nothing"):
            with Client(server.server_address) as client:
                client.send(b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path)
                assert statuses(client.rest()) == [500]
    first, second = [logging.Formatter().format(each) for each in caplog.records]
    assert first.endswith("ValueError: it fails\nwhile answering GET /a%5Cb")
    assert second.endswith("; while answering GET /nothing")
    assert "\n" not in second


# -- WebSockets -------------------------------------------------------------------------------------------------------


class WrongSocket(WebSocketHandler):
    def on_message(self, message: str | bytes) -> Any:
        return message


class WrongState(WebSocketHandler):
    @state(ws_message())
    def talk(self, message: str | bytes) -> Any:
        return message


@pytest.mark.parametrize(("made", "name"), [(WrongSocket, "WrongSocket.on_message"), (WrongState, "WrongState.talk")])
def test_a_wrong_return_value_closes_a_websocket_with_1011(made: type[WebSocketHandler], name: str) -> None:
    begun = opened(made)
    mend = "return a state of this handler, a pair of a state and a want, or None"
    with pytest.raises(InvalidTransition, match=rf"{re.escape(name)} returned 'x': {mend} {HERE}"):
        begun.send(text("x"))
    assert said(begun) == [(CLOSE, close_payload(INTERNAL_ERROR, ""))]


@pytest.mark.parametrize("hook", ["on_open", "on_upgrade"])
def test_a_wrong_return_value_of_a_websockets_hook_names_the_hook(hook: str) -> None:
    class Hooks(WrongSocket):
        def on_open(self) -> Any:
            return "x" if hook == "on_open" else None

        def on_upgrade(self) -> Any:
            return "x" if hook == "on_upgrade" else None

    with pytest.raises(InvalidTransition, match=rf"Hooks\.{hook} returned 'x'.*{HERE}"):
        opened(Hooks)


# -- what is refused when the class is made, or served ----------------------------------------------------------------


WAITING = r"wait in a state, as by return self\.name, call\(f\)"


async def coroutine(*args: Any) -> Any:
    """Is no plain function."""


@pytest.mark.parametrize(
    ("base", "name", "mend"),
    [
        (HTTPRequestHandler, "do_GET", WAITING),
        (HTTPRequestHandler, "on_head", WAITING),
        (HTTPRequestHandler, "on_body", WAITING),
        (HTTPRequestHandler, "respond", WAITING),
        (WebSocketHandler, "on_message", r"AsyncWebSocketHandler"),
        (WebSocketHandler, "on_open", r"AsyncWebSocketHandler"),
        (WebSocketHandler, "on_upgrade", r"AsyncWebSocketHandler"),
    ],
)
def test_a_coroutine_is_refused_when_the_class_is_made(base: type, name: str, mend: str) -> None:
    with pytest.raises(HandlerError, match=rf"coroutine is async def, .*{mend} {HERE}"):
        type("Made", (base,), {name: coroutine})


def test_a_method_that_does_not_take_what_its_route_gives_is_refused_when_the_class_is_made() -> None:
    with pytest.raises(HandlerError, match=rf"Made\.a is called with \(self, id\), .*write def a\(self, id\) {HERE}"):

        class Made(HTTPRequestHandler):
            @route("GET", "/a/{id}")
            def a(self) -> Any:
                return self.answer(200)

    with pytest.raises(HandlerError, match=rf"\.b is called with \(self\), .*write def b\(self\) {HERE}"):

        class Other(HTTPRequestHandler):
            @route("GET", "/b")
            def b(self, id: str) -> Any:
                return self.answer(200)

    with pytest.raises(HandlerError, match=rf"\.do_GET is called with \(self\), .*{HERE}"):

        class Third(HTTPRequestHandler):
            def do_GET(self, path: str) -> Any:
                return self.answer(200)

    with pytest.raises(HandlerError, match=rf"\.c is async def, .*wait in a state.*{HERE}"):

        class Fourth(HTTPRequestHandler):
            @route("GET", "/c")
            async def c(self) -> Any:
                return self.answer(200)


def test_arguments_of_a_route_have_any_order_and_may_have_defaults() -> None:
    class Made(HTTPRequestHandler):
        @route("GET", "/{b}/{a}")
        def a(self, a: str, b: str, c: str = "3") -> Any:
            return self.answer(200, a + b + c)

        def do_something(self, with_it: int) -> int:  # of the author's own
            return with_it

    client = exercise(Made).send(b"GET /2/1 HTTP/1.1\r\nHost: x\r\n\r\n")
    assert took(client).endswith(b"123")


def test_a_handler_that_answers_no_request_is_refused_before_it_serves() -> None:
    class Empty(HTTPRequestHandler):
        """Has no method for a request."""

    for each in (Empty, HTTPRequestHandler):
        with pytest.raises(ConfigurationError, match=rf"{each.__name__} answers no request: define do_GET\(self\), or"):
            check_servable(each)

    class Early(HTTPRequestHandler):
        def on_head(self) -> Transition:
            return self.answer(200)

    check_servable(Early)
    check_servable(type("Late", (HTTPRequestHandler,), {"respond": Early.on_head}))


def test_a_method_that_is_named_like_a_state_of_https_own_is_to_be_renamed() -> None:
    def body(self: Any) -> Any:
        return self.answer(200)

    def takes_item(self: Any, item: None) -> Any:
        return self.answer(200)

    for value in (body, state(nothing())(takes_item)):
        with pytest.raises(HandlerError, match=rf"Made\.body: .* has a state body of its own: rename yours {HERE}"):
            type("Made", (HTTPRequestHandler,), {"body": value})


class Socket(AsyncWebSocketHandler):
    async def handle(self) -> None:
        """Do nothing."""


@pytest.mark.parametrize("made", [Plain, WrongSocket, Socket, wsgi_handler(print)], ids=lambda each: each.__name__)
def test_http_over_datagrams_is_refused_before_anything_is_bound(made: Any) -> None:
    said = rf"^{made.__name__} serves connections, not datagrams: bind tcp://, tls:// or unix://$"
    with pytest.raises(ConfigurationError, match=said):
        reqtable.UDPServer(("127.0.0.1", 0), made)
    with pytest.raises(ConfigurationError, match=said):
        reqtable.serve(made, "udp://127.0.0.1:0")
