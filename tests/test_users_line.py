"""An error of a handler is logged, and raised by `exercise`, with the user's line first and without our frames."""

from __future__ import annotations

import json
import logging
import re
import socketserver
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import reqtable
from reqtable import AsyncRequestHandler, Config, StateRequestHandler, Transition, call, line, sleep, state
from reqtable.config import ExecutorOptions
from reqtable.http import AsyncWebSocketHandler, HTTPRequestHandler, WebSocketHandler, ws_message, wsgi_handler
from reqtable.server.access_log import JSONFormatter, TextFormatter, running_id
from reqtable.table.tracebacks import account_of, trim
from reqtable.testing import Client as Script
from reqtable.testing import SimulationFailed, exercise, simulate
from tests.pages import blocks, text_of
from tests.support import Client, served, serving, wait_until
from tests.test_handler_classes import line_of as line_of_file
from tests.websockets_by_hand import handshake, text

PACKAGE = str(Path(reqtable.__file__).parent)
GET = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


def line_of(words: str) -> str:
    return line_of_file(words, __file__)


def fails(item: Any = None) -> Any:
    raise ValueError("bad")  # in fails


class OfState(StateRequestHandler):
    @state(line())
    def command(self, item: bytes) -> Transition:
        return fails(item)  # type: ignore[no-any-return]


class OfAsync(AsyncRequestHandler):
    async def handle(self) -> None:
        await self.part(await self.read(line()))

    async def part(self, item: bytes) -> None:
        fails(item)


class OfBlocking(reqtable.StreamRequestHandler):
    def handle(self) -> None:
        fails(self.rfile.readline())


class OfHTTP(HTTPRequestHandler):
    def do_GET(self) -> Transition:
        return fails(b"x\n")  # type: ignore[no-any-return]


class OfWebSocket(WebSocketHandler):
    def on_message(self, message: str | bytes) -> Transition:
        return fails(b"x\n")  # type: ignore[no-any-return]


class OfAsyncWebSocket(AsyncWebSocketHandler):
    async def handle(self) -> None:
        await self.read(ws_message())
        fails(b"x\n")


def application(environ: Any, start_response: Any) -> Any:
    return fails(b"x\n")


OfWSGI = wsgi_handler(application)
OfWSGI.__module__ = __name__


@contextmanager
def logged_to(path: Path, formatter: logging.Formatter) -> Iterator[None]:
    """Write the package's log to a file, as forked children can, too."""
    handler = logging.FileHandler(path)
    handler.setFormatter(formatter)
    logger = logging.getLogger("reqtable")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def log_of(handler: Any, dispatch: str, sent: bytes, path: Path, formatter: logging.Formatter | None = None) -> str:
    """Return what is logged if a client sends `sent`."""
    config = Config(executor=ExecutorOptions(arguments={"max_workers": 1}))
    formatter = formatter or TextFormatter("%(levelname)s %(of_request)s%(message)s")
    with logged_to(path, formatter):
        with serving(reqtable.TCPServer(("127.0.0.1", 0), handler, dispatch=dispatch, config=config)) as server:
            with Client(server.server_address) as client:
                client.send(sent).rest()
            wait_until(server, lambda: not server.table)
    return path.read_text()


def check_shape(log: str, method: str) -> None:
    """Check that `log` is one record: the line that names all, and a traceback with the frames of this file alone."""
    first, *rest = log.splitlines()
    said = f"ValueError: bad, in fails ({line_of('# in fails')}), called by {method}"
    assert re.fullmatch(rf"ERROR 127\.0\.0\.1:\d+, request 1: {re.escape(said)}", first), first
    files = [each.split('"')[1] for each in rest if each.strip().startswith('File "')]
    assert set(files) == {__file__}, log
    assert all(each.startswith("    ") for each in rest)


STEPPED = ["inline", "greenlet", "thread", "pool", "fork"]


@pytest.mark.parametrize(
    ("handler", "method", "dispatch"),
    [
        *[(OfState, "OfState.command", each) for each in [*STEPPED, "executor"]],
        *[(OfAsync, "OfAsync.handle", each) for each in STEPPED],
        *[(OfBlocking, "OfBlocking.handle", each) for each in STEPPED],
        *[(OfHTTP, "OfHTTP.do_GET", each) for each in [*STEPPED, "executor"]],
        *[(OfWebSocket, "OfWebSocket.on_message", each) for each in ("inline", "thread", "pool", "fork")],
        *[(OfAsyncWebSocket, "OfAsyncWebSocket.handle", each) for each in ("inline", "thread", "pool", "fork")],
    ],
)
def test_the_log_begins_with_the_users_line(handler: Any, method: str, dispatch: str, tmp_path: Path) -> None:
    sent = b"x\n"
    if issubclass(handler, WebSocketHandler | AsyncWebSocketHandler):
        sent = handshake() + text("x")
    elif issubclass(handler, HTTPRequestHandler):
        sent = GET
    check_shape(log_of(handler, dispatch, sent, tmp_path / "log"), method)


@pytest.mark.parametrize("dispatch", ["pool", "greenlet", "thread", "fork"])
def test_the_log_of_a_wsgi_application_begins_with_its_line(dispatch: str, tmp_path: Path) -> None:
    first, *rest = log_of(OfWSGI, dispatch, GET, tmp_path / "log").splitlines()
    said = f"ValueError: bad, in fails ({line_of('# in fails')}), called by application"
    assert first.endswith(f": {said}")
    assert {each.split('"')[1] for each in rest if each.strip().startswith('File "')} == {__file__}


def test_the_log_in_json_has_the_id_and_the_users_frames(tmp_path: Path) -> None:
    record = json.loads(log_of(OfState, "inline", b"x\n", tmp_path / "log", JSONFormatter()))
    assert record["id"] == 1
    assert f", request 1: ValueError: bad, in fails ({line_of('# in fails')})" in record["message"]
    assert set(re.findall(r'File "(.*?)"', record["traceback"])) == {__file__}


# -- calls ------------------------------------------------------------------------------------------------------------


class Calls(StateRequestHandler):
    on: str | None = None

    @state(line())
    def command(self, item: bytes) -> Transition:
        return self.command, call(fails, item, on=item.strip().decode())  # of a call


class CallsAwaiting(AsyncRequestHandler):
    async def handle(self) -> None:
        item = await self.read(line())
        await self.call(fails, item, on=item.strip().decode())  # of an awaited call


@pytest.mark.parametrize(
    ("handler", "asked"),
    [
        (Calls, f"Calls.command ({line_of('# of a call')})"),
        (CallsAwaiting, f"CallsAwaiting.handle ({line_of('# of an awaited call')})"),
    ],
)
@pytest.mark.parametrize("on", ["thread", "process", "fork"])
def test_what_a_call_raises_names_its_line_and_the_line_that_called(
    handler: Any, asked: str, on: str, tmp_path: Path
) -> None:
    log = log_of(handler, "inline", f"{on}\n".encode(), tmp_path / "log")
    first, *_ = log.splitlines()
    assert ", request 1: ValueError: bad, in fails" in first
    assert f"in fails ({line_of('# in fails')})" in log
    assert f"which {asked} asked for" in log
    assert set(re.findall(r'File "(.*?)"', log)) == {__file__}, log


# -- mistakes for which this package raises ---------------------------------------------------------------------------


TEXT: Any = "text"


class Mistaken(StateRequestHandler):
    @state(line())  # of a mistake
    def command(self, item: bytes) -> Any:
        if item == b"text\n":
            self.send(TEXT)  # of a text
        return item


class MistakenAwaiting(AsyncRequestHandler):
    async def handle(self) -> None:
        item = await self.read(line())
        if item == b"text\n":
            await self.send(TEXT)  # of an awaiting text
        await Future()  # of an awaited mistake


class Future:
    def __await__(self) -> Any:
        yield 5


@pytest.mark.parametrize("dispatch", STEPPED)
@pytest.mark.parametrize(
    ("handler", "sent", "said"),
    [
        (Mistaken, b"\n", f"Mistaken.command returned b'\\n': .* ({line_of('# of a mistake')})"),
        (Mistaken, b"text\n", f"TypeError: send() takes bytes, .*, in Mistaken.command ({line_of('# of a text')})"),
        (
            MistakenAwaiting,
            b"text\n",
            f"TypeError: send() takes .*, in MistakenAwaiting.handle ({line_of('# of an awaiting text')})",
        ),
        (MistakenAwaiting, b"\n", "InvalidTransition: MistakenAwaiting.handle awaited 5, which is not a want: .*"),
    ],
)
def test_a_mistake_shows_no_frame_of_ours(handler: Any, sent: bytes, said: str, dispatch: str, tmp_path: Path) -> None:
    first, *rest = log_of(handler, dispatch, sent, tmp_path / "log").splitlines()
    pattern = re.escape(said).replace(r"\.\*", ".*")
    assert re.fullmatch(f"ERROR 127.0.0.1:\\d+, request 1: {pattern}", first), first
    assert {each.split('"')[1] for each in rest if each.strip().startswith('File "')} <= {__file__}


def test_an_error_of_ours_keeps_our_frames() -> None:
    """Its traceback has no frame of the user, or its last frame did not raise on purpose."""
    try:
        reqtable.Limits(inbox_max=1).replace  # type: ignore[attr-defined]  # noqa: B018
    except AttributeError as error:
        assert trim(error)

    class Entry:
        """Has none of what a handler needs."""

    try:
        OfState(Entry()).send(b"x")  # type: ignore[arg-type]
    except AttributeError as error:
        trim(error)
        files = [each.filename for each in traceback.extract_tb(error.__traceback__)]
    assert files[0] == __file__
    assert files[-1].startswith(PACKAGE)


# -- a server's own handle_error --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("handler", "dispatch"), [(OfState, "inline"), (OfState, "pool"), (OfBlocking, "greenlet")])
def test_an_own_handle_error_finds_the_trimmed_error(handler: Any, dispatch: str) -> None:
    seen: list[Any] = []

    def handle_error(self: Any, request: Any, client_address: Any) -> None:
        kind, error, trace = sys.exc_info()
        assert (kind, error.__traceback__) == (ValueError, trace)  # type: ignore[union-attr]
        seen.append((traceback.format_exc(), running_id()))

    with served(handler, dispatch, handle_error=handle_error) as server, Client(server.server_address) as client:
        client.send(b"x\n").rest()
        wait_until(server, lambda: not server.table)
    [(shown, id)] = seen
    assert set(re.findall(r'File "(.*?)"', shown)) == {__file__}
    assert id == 1


class Interleaved(reqtable.TableMixIn, socketserver.TCPServer):
    """Has the handle_error of socketserver, which prints."""


def test_the_handle_error_of_socketserver_prints_the_users_frames(capfd: Any) -> None:
    with serving(Interleaved(("127.0.0.1", 0), OfBlocking)) as server, Client(server.server_address) as client:
        client.send(b"x\n").rest()
        wait_until(server, lambda: not server.table)
    shown = capfd.readouterr().err
    assert "Exception occurred during processing of request from" in shown
    assert set(re.findall(r'File "(.*?)"', shown)) == {__file__}


# -- tests of a handler -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("handler", [OfState, OfAsync])
def test_exercise_raises_what_pytest_shows_with_the_users_frames(handler: Any) -> None:
    with pytest.raises(ValueError, match="bad") as caught:
        exercise(handler).send(b"x\n")
    shown = caught.traceback.filter(caught)
    assert {str(each.path) for each in shown} == {__file__}
    assert shown[-1].name == "fails"
    files = [each.filename for each in traceback.extract_tb(caught.value.__traceback__)]
    ours = [each for each in files if each.startswith(PACKAGE)]
    assert all(each.startswith(f"{PACKAGE}/testing/") for each in ours), "only what the test has called"


def test_exercise_raises_a_broken_rule_without_our_frames() -> None:
    with pytest.raises(reqtable.InvalidTransition, match=re.escape(line_of("# of a mistake"))) as caught:
        exercise(Mistaken).send(b"\n")
    assert {str(each.path) for each in caught.traceback.filter(caught)} == {__file__}
    files = [each.filename for each in traceback.extract_tb(caught.value.__traceback__)]
    assert all(each == __file__ or each.startswith(f"{PACKAGE}/testing/") for each in files)


def test_exercise_names_wrong_limits() -> None:
    with pytest.raises(TypeError, match="limits must be Limits"):
        exercise(OfState, limits={})  # type: ignore[arg-type]


def test_simulate_names_the_users_line() -> None:
    with pytest.raises(SimulationFailed) as caught:
        simulate(lambda: reqtable.TCPServer(("127.0.0.1", 0), OfState), [Script().send(b"x\n").take_rest()])
    said = f"a handler raised ValueError: bad, in fails ({line_of('# in fails')}), called by OfState.command"
    assert said in str(caught.value)


class Ends(StateRequestHandler):
    @state(line(), timeout=5)  # of an end
    def command(self, text: bytes) -> Any:
        return None if text == b"bye\n" else self.command


class EndsAwaiting(AsyncRequestHandler):
    async def handle(self) -> None:  # of an awaiting end
        await self.read(line())


@pytest.mark.parametrize(
    ("begin", "said"),
    [
        (lambda: exercise(Ends).send(b"bye\n"), f": Ends.command returned None ({line_of('# of an end')})"),
        (lambda: exercise(Ends).jump(6), f" (timeout) in Ends.command ({line_of('# of an end')})"),
        (
            lambda: exercise(EndsAwaiting).send(b"\n"),
            f": EndsAwaiting.handle returned None ({line_of('# of an awaiting end')})",
        ),
    ],
)
def test_exercise_says_how_the_request_ended(begin: Any, said: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(f"b'x' can't be sent: the handler has ended{said}")):
        begin().send(b"x")


# -- one line ---------------------------------------------------------------------------------------------------------


def wrongs() -> dict[str, Any]:
    return {
        "name": lambda: lin(limit=5),  # type: ignore[name-defined]  # noqa: F821
        "attribute": lambda: reqtable.lin,  # type: ignore[attr-defined]
        "argument": lambda: line(limt=5),  # type: ignore[call-arg]
        "argument of state": lambda: state(timout=5),  # type: ignore[call-overload]
    }


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("name", "line"), ("attribute", "line"), ("argument", "limit"), ("argument of state", "timeout")],
)
def test_the_line_names_what_was_probably_meant(wrong: str, meant: str) -> None:
    with pytest.raises((NameError, AttributeError, TypeError)) as caught:
        wrongs()[wrong]()
    assert re.search(rf"Did you mean:? '{meant}'\?, in ", account_of(caught.value))


def test_the_line_names_nothing_where_nothing_is_near() -> None:
    with pytest.raises(AttributeError) as caught:
        reqtable.xyzzyxyzzy  # type: ignore[attr-defined]  # noqa: B018
    assert "Did you mean" not in account_of(caught.value)


def test_the_line_does_not_name_the_name_that_was_used() -> None:
    class Slotted:
        __slots__ = ("count",)

    with pytest.raises(AttributeError) as caught:
        Slotted().count  # noqa: B018
    assert "Did you mean" not in account_of(caught.value)


def test_an_address_at_the_end_of_a_text_is_no_place() -> None:
    with pytest.raises(ValueError, match="no answer") as caught:
        raise ValueError("no answer (localhost:80)")
    assert f", in test_an_address_at_the_end_of_a_text_is_no_place ({__file__}:" in account_of(caught.value)


def test_a_long_text_is_cut_in_the_line() -> None:
    assert account_of(ValueError("x" * 5000)) == f"ValueError: {'x' * 300}…"


class Silent(Exception):
    """Has no text."""

    def __str__(self) -> str:
        raise TypeError("not this one")


def test_an_error_without_a_text_is_named() -> None:
    assert account_of(Silent()) == "Silent: <its str() failed>"
    assert account_of(SyntaxError(None)) == "SyntaxError: None"
    assert account_of(type("Two\nlines", (Exception,), {})()) == r"Two\nlines"


@pytest.mark.parametrize("formatter", [TextFormatter(), JSONFormatter()])
def test_a_very_long_traceback_loses_its_middle(formatter: logging.Formatter) -> None:
    error = ValueError("\x1b" * 10_000_000 + "end")
    record = logging.LogRecord("reqtable", logging.ERROR, __file__, 1, "failed", None, (ValueError, error, None))
    line = formatter.format(record)
    assert len(line) < 1_000_000
    assert "characters left out)" in line
    assert line.rstrip('"}').endswith("end")


def test_the_errors_of_a_group_are_trimmed() -> None:
    class Grouped(StateRequestHandler):
        @state(sleep(1))
        def later(self, _: None) -> Transition:
            try:
                fails()
            except ValueError as error:
                raise ExceptionGroup("several", [error]) from None

    with pytest.raises(ExceptionGroup) as caught:
        exercise(Grouped).jump(2)
    [inner] = caught.value.exceptions
    assert [each.name for each in traceback.extract_tb(inner.__traceback__)] == ["later", "fails"]


def test_the_page_about_errors_shows_what_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = "docs/how-to/read-an-error.md"
    [block] = blocks(page)
    [said] = re.findall(r"^    127\.0\.0\.1:50000, (.*)$", text_of(page), re.MULTILINE)
    (tmp_path / "sums.py").write_text(block.text)
    found: dict[str, Any] = {"__name__": "sums"}
    exec(compile(block.text, "sums.py", "exec"), found)
    first, *_ = log_of(found["Sums"], "inline", b"1 two\n", tmp_path / "log").splitlines()
    assert first.partition(", ")[2] == said
