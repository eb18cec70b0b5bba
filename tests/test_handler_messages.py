"""An error in a handler gives a one-line message: what is wrong, the fix, and the line of the user's own code."""

from __future__ import annotations

import logging
import pickle
import re
import traceback
from collections.abc import Callable
from typing import Any

import pytest

import reqtable
from reqtable import (
    AsyncRequestHandler,
    HandlerError,
    InvalidTransition,
    StateRequestHandler,
    call,
    exactly,
    hand_off,
    line,
    sleep,
    state,
    until,
)
from reqtable.dispatch.pickled_steps import StepRequest, run_step
from reqtable.table.record import record_of
from reqtable.testing import exercise
from tests.support import Client, served
from tests.test_handler_classes import line_of as line_of_file


def line_of(text: str) -> str:
    return line_of_file(text, __file__)


# -- what a state returns ---------------------------------------------------------------------------------------------


class Returns(StateRequestHandler):
    @state(line())  # of command
    def command(self, text: bytes) -> Any:
        return self.choose(text.strip().decode())

    def choose(self, name: str) -> Any:
        return {
            "no state": self.body,
            "no state in a pair": (self.body, line()),
            "another request's": exercise(Returns).handler.command,
            "of the class": Returns.command,
            "a want": line(),
            "the wrong way round": (exactly(2), self.command),
            "a string": "command",
            "another string": "nowhere",
            "a bad want": (self.command, 5),
            "True": True,
            "three": (self.command, line(), 5),
            "much": b"x" * 100_000,
        }[name]

    def body(self, note: bytes) -> Any:  # of body
        return None


MENDS = {
    "no state": f"self.body, which has no @state: put @state(…) before it at {line_of('# of body')}",
    "no state in a pair": f"self.body, which has no @state: put @state(…) before it at {line_of('# of body')}",
    "another request's": "Returns.command, which is not this request's: return self.command",
    "of the class": "Returns.command, which is not this request's: return self.command",
    "a want": "line(limit=65536) in place of a state: return self.command, line(limit=65536)",
    "the wrong way round": "exactly(n=2) in place of a state: return self.command, exactly(n=2)",
    "a string": "the string 'command': return self.command",
    "another string": "'nowhere': return a state of this handler (self.command), a pair of a state and a want, or None",
    "a bad want": "5 as the want of command: return a want, such as line() or exactly(n)",
    "True": "True: return a state of this handler (self.command)",
    "three": "(<bound method",
    "much": "b'xxxxxxxxxx",
}


@pytest.mark.parametrize("what", MENDS)
def test_a_wrong_return_says_what_to_return_and_where(what: str) -> None:
    with pytest.raises(InvalidTransition) as caught:
        exercise(Returns).send(what.encode() + b"\n")
    assert str(caught.value).startswith(f"Returns.command returned {MENDS[what]}")
    assert str(caught.value).endswith(f" ({line_of('# of command')})")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("hook", ["start", "on_timeout", "on_eof", "on_limit", "on_error"])
def test_a_wrong_return_of_a_hook_names_the_hook(hook: str) -> None:
    def wrong(self: Any, *_: Any) -> Any:
        found = "nothing good"
        return found

    class Fails(StateRequestHandler):
        @state(line(limit=5), timeout=3)
        def command(self, text: bytes) -> Any:
            raise ValueError

    wrong.__name__ = hook
    made = type("Made", (Fails,), {hook: wrong})
    with pytest.raises(InvalidTransition, match=rf"Made\.{hook} returned 'nothing good': .*\({__file__}:\d+\)$"):
        begun = exercise(made).jump(4 if hook == "on_timeout" else 1).send(b"x" * (8 if hook == "on_limit" else 2))
        if hook == "on_error":
            begun.send(b"\n")
        begun.end()


def test_a_coroutine_is_no_transition() -> None:
    class Helped(StateRequestHandler):
        @state(line())
        def command(self, text: bytes) -> Any:
            return self.helper()

        async def helper(self) -> Any:
            return self.command

    with pytest.raises(InvalidTransition, match=r"Helped\.command returned a coroutine: .*AsyncRequestHandler \("):
        exercise(Helped).send(b"\n")


def test_a_state_that_is_called_in_place_of_returned_is_told_so() -> None:
    class Calls(StateRequestHandler):
        @state(line())
        def command(self, text: bytes) -> Any:
            body: Any = self.body
            return body()

        @state(line())
        def body(self, text: bytes) -> Any:
            return None

    with pytest.raises(TypeError, match="missing 1 required") as caught:
        exercise(Calls).send(b"\n")
    [note] = caught.value.__notes__
    assert "return self.body, and the engine runs it with the item of its want" in note


def test_where_a_request_ends_is_logged_at_level_debug(caplog: pytest.LogCaptureFixture) -> None:
    class Forgets(StateRequestHandler):
        @state(line(), timeout=5)  # of the forgetful
        def command(self, text: bytes) -> Any:
            self.send(text)

        def on_timeout(self) -> Any:  # of its hook
            return None

    exercise(Forgets).send(b"a\n").expect(b"a\n").expect_end()
    assert caplog.records == []
    with caplog.at_level(logging.DEBUG, "reqtable"):
        exercise(Forgets).send(b"a\n").expect(b"a\n").expect_end()
        exercise(Forgets).jump(6).expect_end()
        exercise(Forgets).end().expect_end()  # by a hook that nobody wrote
    peer = "192.0.2.1:50000"
    assert [record.getMessage() for record in caplog.records] == [
        f"{peer}: Forgets.command returned None: done ({line_of('# of the forgetful')})",
        f"{peer}: Forgets.on_timeout returned None: done ({line_of('# of its hook')})",
    ]


# -- arguments --------------------------------------------------------------------------------------------------------

WRONG: list[tuple[Any, tuple[Any, ...], dict[str, Any], str]] = [
    (state, (line(),), {"timeout": "30"}, "timeout must be a number of seconds, not '30'"),
    (state, (line(),), {"dispatch": 3}, "dispatch must be the name of a policy, such as 'pool', not 3"),
    (sleep, ("3",), {}, "sleep() takes a number of seconds, not '3'"),
    (line, ("500",), {}, "limit must be a whole number of bytes, not '500'"),
    (exactly, (True,), {}, "n of exactly(n) must be a whole number of bytes, not True"),
    (until, ("\n",), {}, "separator must be bytes, such as b';', not '\\n'"),
    (call, (print,), {"on": 3}, "on must be the name of an executor, such as 'process', not 3"),
    (hand_off, (3,), {}, "hand_off() takes the name of a policy, not 3"),
]


@pytest.mark.parametrize(("make", "args", "kwargs", "said"), WRONG)
def test_an_argument_of_a_wrong_type_is_refused_by_name(
    make: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], said: str
) -> None:
    with pytest.raises(TypeError, match=re.escape(said)):
        make(*args, **kwargs)


@pytest.mark.parametrize(
    ("timeout", "error"), [("30", TypeError), (b"3", TypeError), (0, ValueError), (-1, ValueError)]
)
def test_a_wrong_timeout_of_a_read_is_refused_by_name(timeout: Any, error: type[Exception]) -> None:
    class Reads(AsyncRequestHandler):
        async def handle(self) -> None:
            await self.read(line(), timeout=timeout)

    with pytest.raises(error, match=f"timeout must be .*{re.escape(repr(timeout))}"):
        exercise(Reads)


def no_item(self: Any) -> Any:
    return None


def too_many(self: Any, item: Any, more: Any) -> Any:
    return None


@pytest.mark.parametrize(("function", "why"), [(no_item, "too many positional arguments"), (too_many, "'more'")])
def test_what_the_engine_calls_takes_what_it_is_given(function: Any, why: str) -> None:
    with pytest.raises(HandlerError, match=rf"{function.__name__} is called with \(self, item\), .*{why}.*{__file__}:"):
        state(line())(function)
    if function is too_many:
        with pytest.raises(
            HandlerError, match=r"is called with \(self, partial\).*write def too_many\(self, partial\)"
        ):
            type("Hooked", (Returns,), {"on_eof": function})


def test_what_send_is_given_is_named() -> None:
    class Forgets(AsyncRequestHandler):
        async def handle(self) -> None:
            text: Any = self.read(line(limit=9))
            await self.send(text)

    class Text(AsyncRequestHandler):
        async def handle(self) -> None:
            text: Any = "text"
            await self.send(text)

    said = "send() takes bytes, not the want line(limit=9): write data = await self.read(line(limit=9))"
    with pytest.raises(TypeError, match=re.escape(said)):
        exercise(Forgets)
    with pytest.raises(TypeError, match=re.escape("not str: write send(text.encode())")):
        exercise(Text)


# -- calls ------------------------------------------------------------------------------------------------------------


class Calling(StateRequestHandler):
    @state(line())
    def command(self, text: bytes) -> Any:
        if text == b"lambda\n":
            return self.called, call(lambda: 5, on="process")  # of a lambda
        if text == b"argument\n":
            return self.called, call(print, memoryview(text), on="process")
        if text == b"plain\n":
            return self.called, call(len, text, on="process")
        return self.called, call(int, text)  # of a call

    @state()
    def called(self, number: int) -> Any:
        return None


class CallingAwaiting(AsyncRequestHandler):
    async def handle(self) -> None:
        await self.call(int, await self.read(line()))  # of an awaited call


@pytest.mark.parametrize(
    ("handler", "asked"),
    [
        (Calling, f"Calling.command ({line_of('# of a call')})"),
        (CallingAwaiting, f"CallingAwaiting.handle ({line_of('# of an awaited call')})"),
    ],
)
def test_what_a_call_raises_says_where_it_was_asked_for(handler: type, asked: str) -> None:
    with pytest.raises(ValueError, match="invalid literal") as caught:
        exercise(handler).send(b"x\n")
    assert caught.value.__notes__ == [f"raised by call(int), which {asked} asked for"]


@pytest.mark.parametrize(
    ("handler", "asked"),
    [
        (Calling, f"Calling.command ({line_of('# of a call')})"),
        (CallingAwaiting, f"CallingAwaiting.handle ({line_of('# of an awaited call')})"),
    ],
)
def test_what_a_call_raises_in_code_that_is_not_the_users(handler: type, asked: str, caplog: Any) -> None:
    """A state has no frame any more, so the log has one line. A coroutine has a frame, where its traceback begins."""
    with served(handler) as server, Client(server.server_address) as client:
        assert client.send(b"x\n").rest() == b""
    [record] = [each for each in caplog.records if each.name == "reqtable"]
    assert f"raised by call(int), which {asked} asked for" in caplog.text
    assert (record.exc_info is None) == (handler is Calling)
    assert "ValueError" in record.getMessage()


def test_an_own_init_that_forgets_super_is_named(caplog: Any) -> None:
    class Forgetful(StateRequestHandler):
        words: int = 0

        def __init__(self, entry: Any) -> None:  # without super
            if self.words:
                super().__init__(entry)

        @state(line())
        def command(self, text: bytes) -> Any:
            return None

    with served(Forgetful) as server, Client(server.server_address) as client:
        assert client.rest() == b""
    said = f"Forgetful.__init__ does not call super().__init__(entry) ({line_of('# without super')})"
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [said]


def test_a_coroutine_in_a_blocking_handler_is_refused() -> None:
    class Mixed(reqtable.StreamRequestHandler):
        async def handle(self) -> None:  # type: ignore[override]  # of a blocking handler
            pass

    said = (
        "Mixed.handle is a coroutine, but a blocking handler's handle() is not awaited: derive Mixed from "
        f"reqtable.AsyncRequestHandler ({line_of('# of a blocking handler')})"
    )
    with pytest.raises(reqtable.ConfigurationError, match=re.escape(said)):
        reqtable.TCPServer(("127.0.0.1", 0), Mixed)


def test_an_error_that_is_raised_again_and_again_gathers_no_notes() -> None:
    error = ValueError("always the same")

    def fails() -> None:
        raise error

    class Again(StateRequestHandler):
        @state(line())
        def command(self, text: bytes) -> Any:
            return self.command, call(fails)

        def on_error(self, error: Exception) -> Any:
            return self.command

    exercise(Again).send(b"\n").send(b"\n").send(b"\n")
    assert len(error.__notes__) == 1


def test_what_can_not_be_sent_to_another_process_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with served(Calling) as server:
        # the last one waits until the pool has a process: to shut it down while that starts may hang on Python 3.12.1
        for asked in (b"lambda\n", b"argument\n", b"plain\n"):
            with Client(server.server_address) as client:
                assert client.send(asked).rest() == b""
    first, second = (each for each in caplog.records if each.name == "reqtable")
    assert (first.exc_info, second.exc_info) == (None, None)
    said = first.getMessage()
    assert (
        "call(Calling.command.<locals>.<lambda>) can't be sent to another process: its function can't be pickled"
        in said
    )
    assert "define it at the top of a module, or pass on='thread'" in said
    assert f"which Calling.command ({line_of('# of a lambda')}) asked for" in said
    assert "call(print) can't be sent to another process: its argument <memory" in second.getMessage()
    assert "\n" not in said + second.getMessage()


# -- the log ----------------------------------------------------------------------------------------------------------


class Raises(StateRequestHandler):
    @state(line())
    def command(self, text: bytes) -> Any:
        raise ZeroDivisionError


class RaisesAgain(Raises):
    def on_error(self, error: Exception) -> Any:
        raise KeyError("of the hook")


class RaisesAwaiting(AsyncRequestHandler):
    async def handle(self) -> None:
        await self.read(line())
        raise ZeroDivisionError


class RaisesBlocking(reqtable.StreamRequestHandler):
    def handle(self) -> None:
        self.rfile.readline()
        raise ZeroDivisionError


class RaisesElsewhere(StateRequestHandler):
    @state(line())
    def command(self, text: bytes) -> Any:
        return self.command, call(divide)


def divide() -> float:
    return 1 / 0


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "thread", "pool"])
@pytest.mark.parametrize("handler", [Raises, RaisesAgain, RaisesAwaiting, RaisesBlocking, RaisesElsewhere])
def test_the_traceback_of_an_error_begins_with_the_users_code(
    handler: type, dispatch: str, caplog: pytest.LogCaptureFixture
) -> None:
    with served(handler, dispatch) as server, Client(server.server_address) as client:
        assert client.send(b"\n").rest() == b""
    [record] = [each for each in caplog.records if each.name == "reqtable"]
    assert record.exc_info is not None
    error = record.exc_info[1]
    assert error is not None
    while error is not None:
        assert traceback.extract_tb(error.__traceback__)[0].filename == __file__
        error = error.__context__


def test_the_traceback_of_a_shipped_step_begins_with_the_users_code() -> None:
    exercised = exercise(Raises)
    record = record_of(exercised.entry, exercised.handler)
    asked = StepRequest(record, "_resume", b"\n", reqtable.Limits(), True, False)
    back = pickle.loads(run_step(Raises, pickle.dumps(asked)))
    [note] = back.error.__notes__
    heading, _, first, *_ = note.splitlines()
    assert (heading, first.strip().split(", line")[0]) == ("In the worker:", f'File "{__file__}"')


def test_a_broken_rule_that_names_its_place_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with served(Returns) as server, Client(server.server_address) as client:
        assert client.send(b"a want\n").rest() == b""
    [record] = caplog.records
    assert (record.levelno, record.exc_info) == (logging.ERROR, None)
    assert record.getMessage().endswith(f"return self.command, line(limit=65536) ({line_of('# of command')})")


def test_an_error_without_a_line_of_the_user_keeps_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    with served(Returns) as server:
        try:
            server.reconfigure(None)
        except AttributeError as error:
            error.__traceback__ = error.__traceback__.tb_next  # type: ignore[union-attr]
            server.handle_error(None, ("peer", 1))
            left = traceback.extract_tb(error.__traceback__)
    [record] = caplog.records
    assert record.exc_info is not None
    assert [each.name for each in left][:2] == ["reconfigure", "reconfigure"]
