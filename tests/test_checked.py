"""What is wrong with a handler class: each kind of finding, at its line, and what is no finding."""

from __future__ import annotations

import ast
import functools
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import reqtable
from reqtable import AsyncRequestHandler, BaseRequestHandler, HandlerError, StateRequestHandler
from reqtable.config.import_string import module_at
from reqtable.handlers import checked
from reqtable.handlers.finding import Finding, finding_in
from reqtable.handlers.source import Sources
from reqtable.run.commands.check import check_command
from tests.support import WAIT_S

HEAD = """\
import contextlib, dataclasses, enum, functools, io, socket, sys, threading, typing
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NoReturn
import reqtable
from reqtable import *
from reqtable.http import HTTPRequestHandler, route


def refuse() -> NoReturn:
    raise ValueError


def fails():
    raise ValueError


def endless():
    while True:
        yield


class Asked:
    def __getattr__(self, name):
        raise RuntimeError(name)


asked = Asked()


class Login(StateRequestHandler):
    @state(line())
    def name(self, text):
        return self.name


"""
NUMBERS = iter(range(10_000))


@pytest.fixture
def made(tmp_path: Any, monkeypatch: Any) -> Any:
    """Make the class `Bad` of some source. Returns it, or the finding that its making raises."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    modules = []

    def make(source: str) -> Any:
        file = tmp_path / f"checked_{next(NUMBERS)}.py"
        file.write_text(HEAD + source)
        modules.append(file.stem)
        try:
            return module_at(str(file)).Bad
        except (HandlerError, TypeError) as error:
            return finding_in(error)

    yield make
    for each in modules:
        sys.modules.pop(each, None)


def findings(handler_class: Any) -> list[Finding]:
    return checked.findings(handler_class, Sources())


def told(made: Any, source: str) -> list[tuple[str, str]]:
    """Return the kind of each finding, and the text of its line."""
    found = made(source)
    lines = (HEAD + source).splitlines()
    rows = findings(found) if isinstance(found, type) else [found]
    return [(each.kind, lines[int(each.place.rpartition(":")[2]) - 1].partition("  #")[0].strip()) for each in rows]


STATE = "class Bad(StateRequestHandler):\n"
FIRST = STATE + "    @state(line())\n    def first(self, text):\n"
AWAITING = "class Bad(AsyncRequestHandler):\n    async def handle(self):\n"

# source, and the kind and the line of its finding
BAD = [
    (STATE + "    pass\n", "no-state", "class Bad(StateRequestHandler):"),
    (
        FIRST + "        return None\n    @state()\n    def lost(self, _):\n        return None\n",
        "unreached",
        "@state()",
    ),
    (
        FIRST + "        return None\n    @state()\n    def lost(self, _):\n        return self.lost\n",
        "unreached",
        "@state()",
    ),
    ("class Bad(Login):\n    def name(self, text):\n        return None\n", "lost-state", "def name(self, text):"),
    (STATE + "    @state(line())\n    async def first(self, text):\n        pass\n", "async", "@state(line())"),
    (FIRST + "        yield\n", "generator", "@state(line())"),
    (STATE + "    @state(line())\n    def first(self):\n        return None\n", "arguments", "@state(line())"),
    (STATE + "    @state(line())\n    def server(self, text):\n        return None\n", "name", "@state(line())"),
    (STATE + "    @state(line)\n    def first(self, text):\n        return None\n", "want", "@state(line)"),
    (AWAITING + "        text = await self.read(line)\n", "want", "text = await self.read(line)"),
    (AWAITING + "        await self.read(reqtable.line)\n", "want", "await self.read(reqtable.line)"),
    (FIRST + "        sleep(1)\n        return None\n", "discarded", "sleep(1)"),
    (FIRST + "        reqtable.sleep(1)\n        return None\n", "discarded", "reqtable.sleep(1)"),
    (AWAITING + "        self.read(line())\n", "discarded", "self.read(line())"),
    (AWAITING + "        self.send(b'x')\n", "not-awaited", "self.send(b'x')"),
    (AWAITING + "        self.help()\n    async def help(self):\n        pass\n", "not-awaited", "self.help()"),
    ("class Bad(AsyncRequestHandler):\n    pass\n", "handle", "class Bad(AsyncRequestHandler):"),
    ("class Bad(AsyncRequestHandler):\n    def handle(self):\n        pass\n", "handle", "def handle(self):"),
    (
        "class Bad(StreamRequestHandler):\n    async def handle(self):\n        pass\n",
        "async",
        "async def handle(self):",
    ),
    (
        "class Bad(StreamRequestHandler):\n    def __init__(self, request):\n        pass\n",
        "init",
        "def __init__(self, request):",
    ),
    (
        "class Bad(Login):\n    def __init__(self, entry, words):\n        super().__init__(entry)\n",
        "init",
        "def __init__(self, entry, words):",
    ),
    (
        "class Bad(Login):\n    words: int = 0\n    def __init__(self, entry):\n        self.words = 1\n",
        "init",
        "def __init__(self, entry):",
    ),
    (
        "class Bad(Login):\n    def __init__(self, entry):\n        self.entry = entry\n",
        "init",
        "def __init__(self, entry):",
    ),
    ("class Bad(Login):\n    def __new__(cls):\n        return None\n", "init", "def __new__(cls):"),
    ("class Bad:\n    def handle(self):\n        pass\n", "init", "class Bad:"),
    ("@dataclasses.dataclass\nclass Bad(Login):\n    words: int = 0\n", "init", "@dataclasses.dataclass"),
    (
        "class Bad(Login):\n    def __init__(self, entry):\n        super().__init__(entry)\n        self.words = 0\n",
        "undeclared",
        "self.words = 0",
    ),
    (
        "class Bad(Login):\n    def help(self):\n        self._a, self.entry = 1, 2\n",
        "undeclared",
        "self._a, self.entry = 1, 2",
    ),
    (
        "class Bad(Login):\n    def help(self, other):\n        self.send = other.write\n        self.send('hi')\n",
        "undeclared",
        "self.send = other.write",
    ),
    ("class Bad(Login):\n    hook: Callable[[], None]\n", "field", "hook: Callable[[], None]"),
    ("class Bad(Login):\n    hook: Any = len\n", "field", "hook: Any = len"),
    ("class Bad(Login):\n    peer: 'socket.socket | None' = None\n", "field", "peer: 'socket.socket | None' = None"),
    ("class Bad(Login):\n    lock: threading.Lock\n", "field", "lock: threading.Lock"),
    ("class Bad(Login):\n    log: typing.TextIO\n", "field", "log: typing.TextIO"),
    ("class Bad(Login):\n    rows: dict[str, Iterator[int]]\n", "field", "rows: dict[str, Iterator[int]]"),
    ("class Bad(Login):\n    lock: Any = threading.Lock()\n", "default", "class Bad(Login):"),
    ("class Bad(Login):\n    state_version: int = 2\n", "version", "class Bad(Login):"),
    (
        "class Bad(Login):\n    def on_start(self, server):\n        pass\n",
        "class-method",
        "def on_start(self, server):",
    ),
    (
        "class Bad(Login):\n    def on_limit(self, error):\n        self.send(b'long')\n        return self.name\n",
        "limit",
        "return self.name",
    ),
    ("class Bad(HTTPRequestHandler):\n    pass\n", "no-state", "class Bad(HTTPRequestHandler):"),
    (
        STATE + "    def start(self):\n        return self.begin()\n    def begin(self):\n        return None\n",
        "no-state",
        "class Bad(StateRequestHandler):",
    ),
    (
        STATE + "    def start(self):\n        return self.first\n    def first(self, text):\n        return None\n",
        "transition",
        "return self.first",
    ),
    *(
        (FIRST + f"        return {what}\n    def other(self, text):\n        return None\n", kind, f"return {what}")
        for kind, whats in {
            "transition": [
                "self.other",
                "self.other if text else self.first",
                "None if text else self.other",
                "self.other, line()",
                "self.first()",
                "self.start",
                "self.on_timeout",
                "True",
                "'first'",
                "'first', line()",
                "f'{text}'",
                "[self.first]",
                "self.first, line(), 5",
                "lambda: 1",
                "None, line()",
                "self.first, 5",
                "self.first, self.first",
                "line()",
                "reqtable.line()",
                "line(), self.first",
            ],
            "want": ["self.first, line", "self.first, reqtable.line"],
            "attribute": ["self.firts", "self.firts, line()", "self.nowhere"],
        }.items()
        for what in whats
    ),
    ("class Bad(Login):\n    def on_timeout(self):\n        return False\n", "transition", "return False"),
    (FIRST + "        self.send('hi')\n        return None\n", "text", "self.send('hi')"),
    (FIRST + "        self.send(f'hi {text}')\n        return None\n", "text", "self.send(f'hi {text}')"),
    ("class Bad(Login):\n    def help(self):\n        self.send('hi')\n", "text", "self.send('hi')"),
    (AWAITING + "        await self.send('hi')\n", "text", "await self.send('hi')"),
    (STATE + "    @state\n    def first(self, text):\n        return None\n", "want", "@state"),
    *(
        (f"class Bad(Login):\n    def {name}(self):\n        return None\n", "hook", f"def {name}(self):")
        for name in ("on_timout", "on_time_out", "onTimeout", "on_eror", "on_closed", "migrat", "savestate", "starts")
    ),
    (AWAITING + "        pass\n    def on_closee(self):\n        pass\n", "hook", "def on_closee(self):"),
    ("class Bad(Login):\n    n: int\n    def help(self):\n        return self.n\n", "unset", "n: int"),
    ("class Bad(Login):\n    n: int\n    def help(self):\n        self.n += 1\n", "unset", "n: int"),
    ("class Bad(Login):\n    def help(self):\n        self.count += 1\n", "unset", "self.count += 1"),
    (
        "class Bad(Login):\n    def help(self):\n        self.count += 1\n    def begin(self):\n"
        "        self.count = 0  # set\n",
        "undeclared",
        "self.count += 1",
    ),
    (
        "class Bad(AsyncRequestHandler):\n    n: int\n    async def handle(self):\n        self.n += 1\n",
        "unset",
        "n: int",
    ),
    (STATE + "    @state()\n    def first(self, text):\n        return self.first\n", "no-want", "return self.first"),
    (
        STATE + "    @state()\n    def first(self, text):\n        if text:\n            return None\n"
        "        return self.first\n",
        "no-want",
        "return self.first",
    ),
    (
        FIRST + "        return self.a\n    @state()\n    def a(self, _):\n        return self.b\n"
        "    @state()\n    def b(self, _):\n        return self.a  # again\n",
        "no-want",
        "return self.a",
    ),
    (
        FIRST + "        return self.first, start_tls(cert='absent.pem')\n",
        "file",
        "return self.first, start_tls(cert='absent.pem')",
    ),
    (
        AWAITING + "        await self.read(start_tls(cert='absent.pem'))\n",
        "file",
        "await self.read(start_tls(cert='absent.pem'))",
    ),
]

# A source, and what its finding says is to be written.
MENDS = [
    (FIRST + "        return self.firts\n", "did you mean self.first?"),
    (FIRST + "        return self.start\n", "return a state"),
    (FIRST + "        return self.first()\n", "write return self.first, and the engine runs it"),
    (FIRST + "        return line()\n", "write return self.first, line()"),
    (FIRST + "        return self.first, 5\n", "return a want, such as line() or exactly(n)"),
    (FIRST + "        return None, line()\n", "return None alone to close, or a state in its place"),
    ("@dataclasses.dataclass\nclass Bad(Login):\n    words: int = 0\n", "leave out @dataclass"),
    (FIRST + "        return 'first'\n", "return a state, as in return self.first, or None to close"),
    (
        FIRST + "        return self.help\n    def help(self):\n        return self.first\n",
        "call it, as in return self.help(…)",
    ),
    (
        FIRST + "        return self.last\n    def last(self, item):\n        return None\n",
        "put @state(…) before it at ",
    ),
    (FIRST + "        self.send('hi')\n        return None\n", "write self.send(b'hi')"),
    (FIRST + "        self.send('é')\n        return None\n", "write self.send('é'.encode())"),
    (FIRST + "        self.send(f'{text}')\n        return None\n", "write self.send(f'{text}'.encode())"),
    ("class Bad(Login):\n    def help(self):\n        self.count += 1\n", "give it a value in the class, as in count"),
    (
        "class Bad(Login):\n    hook: Any = len\n",
        "annotate it as ClassVar to share it, or set it when the request begins",
    ),
    (
        "class Bad(Login):\n    lock: threading.Lock\n",
        "keep data from which it is made again, or annotate the field as Any",
    ),
    ("class Bad(Login):\n    def on_timout(self):\n        return None\n", "did you mean on_timeout?"),
    (
        STATE + "    @state()\n    def first(self, text):\n        return self.first\n",
        "write @state(line()) before first, or return self.first, line()",
    ),
    (STATE + "    @state\n    def first(self, text):\n        return None\n", "write @state(line())"),
    (STATE + "    @state(line)\n    def first(self, text):\n        return None\n", "call it, as in @state(line(…))"),
]


@pytest.mark.parametrize(("source", "mend"), MENDS)
def test_a_finding_says_what_to_write(made: Any, source: str, mend: str) -> None:
    found = made(source)
    [finding] = findings(found) if isinstance(found, type) else [found]
    assert finding.mend.startswith(mend)


@pytest.mark.parametrize(
    ("body", "refuses"),
    [
        ("", True),
        ("self.last = text", True),
        ("self.send(b'x')", False),
        # what may raise an exception
        ("fails()", False),
        ("self.last[0]", False),
        ("self.last += 1", False),
        ("assert self.last", False),
    ],
)
def test_a_state_that_may_do_more_than_go_on_for_ever_is_only_a_doubt(made: Any, body: str, refuses: bool) -> None:
    first = f"    last: Any = 0\n    @state()\n    def first(self, text):\n{indented(body)}        return self.first\n"
    bad = made(STATE + first)
    assert [(each.kind, each.refuses) for each in findings(bad)] == [("no-want", refuses)]


def test_a_long_chain_of_elif_is_looked_at(made: Any) -> None:
    chain = "".join(f"elif text == b'{number}':\n    return None\n" for number in range(2000))
    loop = "for each in text:\n" + indented(f"if each:\n    return None\n{chain}else:\n    break\n")
    assert told(made, FIRST + indented(f"if text:\n    return None\n{chain}")) == [
        ("no-return", "elif text == b'1999':")
    ]
    assert told(made, FIRST + indented(loop)) == [("no-return", "break")]


@pytest.mark.parametrize(("source", "kind", "line"), BAD, ids=lambda each: None if "\n" in each else each)
def test_each_kind_of_finding_has_its_line(made: Any, source: str, kind: str, line: str) -> None:
    assert told(made, source) == [(kind, line)]


# The body of a state, and the line after which it ends without a return.
ENDS = [
    ("self.send(text)", "self.send(text)"),
    ("if text:\n    return None", "if text:"),
    ("if text:\n    return None\nelif self:\n    self.send(b'')\nelse:\n    return None", "self.send(b'')"),
    ("while text:\n    return None", "while text:"),
    ("while True:\n    if text:\n        break", "break"),
    ("while True:\n    while text:\n        return None\n    else:\n        break", "break"),
    ("for each in text:\n    return None", "for each in text:"),
    ("for each in text:\n    pass\nelse:\n    self.send(b'')", "self.send(b'')"),
    ("try:\n    return int(text)\nexcept ValueError:\n    self.send(b'')", "self.send(b'')"),
    ("try:\n    x = int(text)\nexcept ValueError:\n    return None\nelse:\n    x = 1", "x = 1"),
    ("try:\n    self.send(b'')\nfinally:\n    self.send(b'x')", "self.send(b'')"),
    ("with contextlib.suppress(ValueError):\n    return int(text)", "with contextlib.suppress(ValueError):"),
    ("match text:\n    case b'a':\n        return None", "match text:"),
    ("match text:\n    case b'a':\n        return None\n    case _ if self:\n        return None", "match text:"),
    ("match text:\n    case b'a':\n        self.send(b'')\n    case _:\n        return None", "self.send(b'')"),
    ("def inner():\n    return None\ninner()", "inner()"),
    ("return_ = lambda: None", "return_ = lambda: None"),
    ("if text:\n    return None\nendless()", "endless()"),
    ("fails = text.strip\nif text:\n    return None\nfails()", "fails()"),
    ("if text:\n    return None\nasked.first()", "asked.first()"),
]
# The body of a state that ends only where it is written to end.
DOES_NOT_END = [
    "return None",
    "return",
    "raise ValueError",
    "while True:\n    pass",
    "while 1:\n    for each in text:\n        break",
    "while True:\n    if text:\n        return None\n    continue",
    "for each in text:\n    break\nelse:\n    return None\nreturn None",
    "if text:\n    return None\nelse:\n    return self.first",
    "match text:\n    case b'a':\n        return None\n    case _:\n        return self.first",
    "match text:\n    case (b'a' | b'b') as x:\n        return None\n    case x:\n        return None",
    "match text:\n    case (b'a' | _) as all_of_it:\n        return None",
    "try:\n    return int(text)\nfinally:\n    self.send(b'')",
    "try:\n    self.send(b'')\nfinally:\n    return None",
    "try:\n    return int(text)\nexcept ValueError:\n    raise\nexcept KeyError:\n    return None",
    "try:\n    pass\nexcept* ValueError:\n    pass\nelse:\n    pass\nreturn None",
    "with io.BytesIO() as a, io.BytesIO() as b:\n    return None",
    "with io.BytesIO():\n    return\n",
    "if text:\n    return None\nsys.exit(1)",
    "if text:\n    return None\nrefuse()",
    "if text:\n    return None\nfails()",
    "if text:\n    return None\nself.refuse()",
    "if text:\n    return None\nassert False",
]


def indented(body: str) -> str:
    return "".join(f"        {line}\n" for line in body.splitlines())


@pytest.mark.parametrize(("body", "line"), ENDS)
def test_a_state_that_may_end_without_a_return(made: Any, body: str, line: str) -> None:
    assert told(made, FIRST + indented(body)) == [("no-return", line)]


@pytest.mark.parametrize("body", DOES_NOT_END)
def test_a_state_that_ends_where_it_is_written(made: Any, body: str) -> None:
    helper = "    def refuse(self):\n        raise ValueError\n"
    assert told(made, FIRST + indented(body) + helper) == []


# Classes with nothing wrong.
GOOD = [
    "class Bad(Login):\n    def start(self):\n        return self.name\n",
    FIRST + "        return self.help()\n    def help(self):\n        return self.last\n"
    "    @state()\n    def last(self, _):\n        return None\n",
    # a last state that says so
    STATE + "    @state(line())\n    def first(self, text) -> None:\n        self.send(text)\n",
    # states that are found by their names
    FIRST + "        return getattr(self, 'on_' + text.decode())\n"
    "    @state()\n    def on_a(self, _):\n        return None\n",
    STATE + "    NEXT: ClassVar[dict] = {b'a': 'last'}\n    @state(line())\n    def first(self, text):\n"
    "        return self.pick(text)\n    def pick(self, text):\n        return type(self).NEXT\n"
    "    @state()\n    def last(self, _):\n        return None\n",
    "def pick(handler):\n    return handler.last\n" + FIRST + "        return pick(self)\n"
    "    @state()\n    def last(self, _):\n        return None\n",
    # a state of the base that an override calls, and that leads on
    "class Base(StateRequestHandler):\n    @state(line())\n    def first(self, text):\n        return self.last\n"
    "    @state()\n    def last(self, _):\n        return None\n"
    "class Bad(Base):\n    @state(line())\n    def first(self, text):\n        return super().first(text)\n",
    # a state of the base that a derived class does without
    "class Base(StateRequestHandler):\n    @state(line())\n    def first(self, text):\n        return self.last\n"
    "    @state()\n    def last(self, _):\n        return None\n"
    "class Bad(Base):\n    @state(line())\n    def first(self, text):\n        return None\n",
    # fields that are data, or may be
    "class Color(enum.Enum):\n    RED = 1\nclass Bad(Login):\n    a: int = 0\n    b: 'list[str] | None' = None\n"
    "    c: Color = Color.RED\n    d: typing.BinaryIO\n    e: io.FileIO\n    f: Any\n    g: typing.Sequence[int]\n"
    "    h: 'Unknown'\n    i: ClassVar[socket.socket]\n    j: Connection | None = None\n    k: tuple[int, ...] = ()\n",
    "class Bad(Login):\n    @property\n    def words(self):\n        return 1\n    @words.setter\n"
    "    def words(self, value):\n        pass\n    def help(self):\n        self.words = 2\n        other = self\n",
    # an on_limit that skips, closes, or looks which state it was
    "class Bad(Login):\n    def on_limit(self, error):\n        return self.skipped, skip_line()\n"
    "    @state()\n    def skipped(self, _):\n        return self.name\n",
    "class Bad(Login):\n    def on_limit(self, error):\n        return None\n",
    "class Bad(Login):\n    def on_limit(self, error):\n        return self.name if self.state_name == 'x' else None\n",
    AWAITING + "        await self.send(b'x')\n        waits = self.send(b'')\n        await waits\n",
    "class Bad(StreamRequestHandler):\n    def handle(self):\n        pass\n",
    "class Bad(HTTPRequestHandler):\n    @route('GET', '/')\n    def show(self):\n        return self.more, flushed()\n"
    "    @state()\n    def more(self, _):\n        return self.end_answer()\n",
    # a function that calls the constructor of the base
    "def begin(handler, entry):\n    super(Bad, handler).__init__(entry)\n"
    "class Bad(Login):\n    def __init__(self, entry):\n        begin(self, entry)\n",
    # returns that may be right
    FIRST + "        line = self.help\n        return line()\n    def help(self):\n        return self.first\n",
    FIRST + "        return self.first, None\n",
    FIRST + "        found = 'x'\n        return found\n",
    FIRST + "        return self.pick(text)\n    def pick(self, text):\n        return self.first\n",
    FIRST + "        self.then = self.first\n        return self.then\n    then: Any = None\n",
    FIRST + "        setattr(self, 'then', self.first)\n        return self.then\n",
    FIRST + "        return self.then\n    def __getattr__(self, name):\n        return self.first\n",
    FIRST + "        return self.then\n    @property\n    def then(self):\n        return self.first\n",
    FIRST + "        return self.last()\n    @state()\n    def last(self, item=None):\n        return None\n",
    FIRST + "        return self.first, line() if text else line(5)\n",
    FIRST + "        return (self.first if text else self.last), line()\n    @state()\n    def last(self, _):\n"
    "        return None\n",
    FIRST + "        def inner():\n            return 5\n        return None\n",
    STATE + "    def start(self) -> None:\n        self.send(b'now')\n",
    STATE + "    def start(self):\n        self.send(b'now')\n        return None\n",
    "def changed(function):\n    @functools.wraps(function)\n    def call(self, item):\n"
    "        return getattr(self, function(self, item))\n    return call\n"
    + STATE
    + "    @changed\n    @state(line())\n    def first(self, text):\n        return 'first'\n",
    "class Bad(Login):\n    def name(self, text):\n        return self.asked\n    name = state(line())(name)\n"
    "    @state()\n    def asked(self, _):\n        return None\n",
    "class Bad(Login):\n    def send(self, data):\n        super().send(str(data).encode())\n"
    "    def help(self):\n        self.send('hi')\n",
    "class Bad(HTTPRequestHandler):\n    def do_GET(self):\n        return self.answer(200, 'hi')\n",
    FIRST + "        return self.first, start_tls(cert=__file__)\n",
    FIRST + "        return self.first, start_tls(cert='/dev/null')\n",
    # fields without a default that something sets, or that are not read
    "class Bad(Login):\n    n: int\n    def help(self):\n        self.n = 1\n        return self.n\n",
    "class Bad(Login):\n    n: int\n    def help(self, other):\n        other.n = 1\n        return self.n\n",
    "class Bad(Login):\n    n: int\n    def help(self):\n        return self.n if hasattr(self, 'n') else 0\n",
    "class Bad(Login):\n    n: int\n    def help(self, **values):\n        vars(self).update(values)\n"
    "        return self.n\n",
    "class Bad(Login):\n    n: int\n",
    "class Bad(Login):\n    n: int\n    @classmethod\n    def on_start(cls, server):\n        cls.n = 1\n"
    "    def help(self):\n        return self.n\n",
    "class Bad(Login):\n    n: int\n    @contextlib.contextmanager\n    def set(self):\n        self.n = 1\n"
    "        yield\n    def help(self):\n        return self.n\n",
    # methods with names like those of hooks, that something calls
    "class Bad(Login):\n    def on_timout(self):\n        return None\n    def on_timeout(self):\n"
    "        return self.on_timout()\n",
    "class Bad(Login):\n    def restart(self):\n        return None\n",
    "class Bad(Login):\n    def on_timeouts(self):\n        return None\n    def on_timeout(self):\n"
    "        return getattr(self, 'on_timeout' + 's')()\n",
    FIRST + "        return self.on_timed_out\n    @state()\n    def on_timed_out(self, _):\n        return None\n",
    # states without a want, that end or wait after all
    STATE + "    left: int = 9\n    @state()\n    def first(self, _):\n        self.left -= 1\n"
    "        return self.first if self.left else None\n",
    STATE + "    @state()\n    def first(self, text):\n        return self.first, line()\n",
    STATE + "    @state()\n    def first(self, _):\n        return self.again\n"
    "    @state(line())\n    def again(self, text):\n        return self.first\n",
    STATE + "    @state()\n    def first(self, _):\n        if self.entry.steps > 9:\n            raise ValueError\n"
    "        return self.first\n",
    STATE + "    @state()\n    def first(self, _):\n        if self.entry.steps > 9:\n            return\n"
    "        return self.first\n",
    FIRST + "        wants = (line, exactly)\n        return self.first, wants[0]()\n",
]


@pytest.mark.parametrize("source", GOOD)
def test_nothing_is_found_in_what_is_right(made: Any, source: str) -> None:
    assert told(made, source) == []


# -- the command, and a server that starts ----------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "how-to" / "check-a-handler.md").read_text()


def check(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "reqtable", "check", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=WAIT_S, check=False
    )


HANDLERS = (StateRequestHandler, AsyncRequestHandler, BaseRequestHandler)


def examples() -> list[str]:
    """Return every handler class of the examples, as the command takes it."""
    modules = [importlib.import_module(f"examples.{path.stem}") for path in sorted((ROOT / "examples").glob("*.py"))]
    return [
        f"{module.__name__}:{name}"
        for module in modules
        for name, each in vars(module).items()
        if isinstance(each, type) and each.__module__ == module.__name__ and issubclass(each, HANDLERS)
    ]


def test_nothing_is_found_in_the_examples() -> None:
    handlers = examples()
    assert "examples.notes:Notes" in handlers
    assert "examples.echo:BlockingEcho" in handlers
    result = check(*handlers)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{', '.join(handlers)}: no findings\n", "")


def test_the_page_shows_what_the_command_prints(tmp_path: Path) -> None:
    [source] = re.findall(r"^```python[^\n]*\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    [shown] = re.findall(r"^```console\n\$ reqtable check (.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    arguments, _, output = shown.partition("\n")
    (tmp_path / "letters.py").write_text(source)
    result = check(*arguments.split(), folder=tmp_path)
    assert (result.stdout, result.stderr, result.returncode) == (output, "", 1)


def test_the_page_names_every_kind() -> None:
    sources = "".join(path.read_text() for path in Path(reqtable.__file__).parent.rglob("*.py"))
    kinds = set(re.findall(r'(?:Finding|refusal)\(\s*"([a-z-]+)"', sources))
    assert kinds >= {kind for _, kind, _ in BAD} | {"no-return"}
    for each in kinds:
        assert f"`{each}`" in PAGE, each


def test_the_command_prints_rows_of_several_handlers(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(HEAD)
    (tmp_path / "bad.py").write_text(HEAD + FIRST + "        return self.first, line\n")
    result = check("good.py:Login", "bad.py:Bad", "bad.py:Other", "--json", folder=tmp_path)
    assert (result.returncode, result.stderr) == (1, "")
    [row] = json.loads(result.stdout)
    assert row == {
        "kind": "want",
        "place": f"{tmp_path}/bad.py:{len(HEAD.splitlines()) + 4}",
        "text": "Bad.first: line is a function that makes a want, and no want",
        "mend": "call it, as in line(…)",
        "refuses": True,
    }
    assert json.loads(check("good.py:Login", "--json", folder=tmp_path).stdout) == []


@pytest.fixture
def parsed(monkeypatch: Any) -> list[Any]:
    """Return a list to which each call of `ast.parse` adds its arguments."""
    parse, calls = ast.parse, []
    monkeypatch.setattr(ast, "parse", lambda *given: calls.append(given) or parse(*given))
    return calls


def test_the_command_parses_a_file_once_for_all_its_handlers(made: Any, parsed: list[Any]) -> None:
    file = sys.modules[made(FIRST + "        self.send(text)\n").__module__].__file__
    assert check_command.main([f"{file}:Bad", f"{file}:Login"], standalone_mode=False) == 1
    assert len(parsed) == 1


def test_a_server_that_starts_parses_a_file_once(made: Any, parsed: list[Any]) -> None:
    bad = made(FIRST + "        self.send(text)\n")
    for _ in range(2):
        reqtable.TCPServer(("127.0.0.1", 0), bad).server_close()
    assert len(parsed) == 1


def test_what_a_module_prints_is_no_finding(tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text(HEAD + "print('loud')\n")
    result = check("loud.py:Login", "--json", folder=tmp_path)
    assert (result.returncode, json.loads(result.stdout), result.stderr) == (0, [], "loud\n")


def test_what_can_not_be_checked_is_a_wrong_argument(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import reqtable\n1 / 0\n")
    result = check("broken.py:Any", folder=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert f"ZeroDivisionError: division by zero ({tmp_path}/broken.py:2)" in result.stderr


def test_a_server_that_starts_warns_once_of_each_doubt(made: Any, caplog: pytest.LogCaptureFixture) -> None:
    bad = made(FIRST + "        self.send(text)\n    @state()\n    def lost(self, _):\n        return None\n")
    for _ in range(2):
        reqtable.TCPServer(("127.0.0.1", 0), bad).server_close()
    assert [each.getMessage() for each in caplog.records] == [str(each) for each in findings(bad)]
    assert {(each.name, each.levelname) for each in caplog.records} == {("reqtable", "WARNING")}
    assert all(each.getMessage().count("\n") == 0 for each in caplog.records)
    assert [each.kind for each in findings(bad)] == ["unreached", "no-return"]


def test_a_partial_is_checked_as_its_class(made: Any) -> None:
    bad = made(FIRST + "        self.send(text)\n")
    assert findings(functools.partial(bad)) == findings(bad) != []


def test_a_class_without_source_is_no_trouble() -> None:
    names: dict[str, Any] = {}
    exec(HEAD + FIRST + "        self.send(text)\n", names)
    assert findings(names["Bad"]) == []
