"""The handlers of the servers that are restarted. Each version of `Ledger` keeps its state in another shape."""

from __future__ import annotations

import os
from pathlib import Path

PIECE_BYTES = 16_384

LEDGER = '''
"""Version {version} of a handler whose answers depend on what its client has sent before."""

import zlib
from typing import ClassVar

from reqtable import StateRequestHandler, exactly, flushed, line, sleep, state


class Ledger(StateRequestHandler):
    state_version: ClassVar[int] = {version}

    count: int = 0
    total: int = 0
    last: {annotation} = {kind}()
    left: int = 0  # bytes of an upload, or pieces of a download
    crc: int = 0
    seed: int = 0
    {added}

    @classmethod
    def migrate(cls, version, state, fields):
        fields = {{name: value for name, value in fields.items() if name != "mark_%d" % version}}
        fields["last"] = {kind}(fields.get("last", ()))
        fields["mark_{version}"] = version
        return {names}.get(state, state), fields

    @state(line(limit=4096), timeout=600)
    def {ask}(self, text):
        verb, *rest = text.split()
        numbers = [int(each) for each in rest]
        if verb == b"take":
            self.left, self.crc = numbers[0], 0
            return self.{body}, exactly(min(self.left, {piece}))
        if verb == b"give":
            self.left, self.seed = numbers
            return self.{give}, flushed()
        if verb == b"rest":
            return self.{rest}, sleep(numbers[0] / 1000)
        self.add(numbers[0])
        return None if verb == b"once" else self.{ask}

    @state(timeout=600)
    def {body}(self, data):
        self.left -= len(data)
        self.crc = zlib.crc32(data, self.crc)
        if self.left:
            return self.{body}, exactly(min(self.left, {piece}))
        self.add(self.crc)
        return self.{ask}

    @state(timeout=600)
    def {give}(self, _):
        if not self.left:
            self.add(self.seed)
            return self.{ask}
        self.left -= 1
        self.send((b"%d.%d." % (self.seed, self.left) * {piece})[:{piece}])
        return self.{give}, flushed()

    @state()
    def {rest}(self, _):
        self.add(0)
        return self.{ask}

    def add(self, number):
        self.count += 1
        self.total += number
        self.last = {kind}([*self.last, number][-8:])
        shown = ",".join(map(str, self.last))
        self.send(b"%d %d %s %d\\n" % (self.count, self.total, shown.encode(), self.state_version))
'''

HTTP = '''
"""Version {version} of a handler of HTTP requests, and one of WebSockets."""

import zlib
from typing import ClassVar

from reqtable import flushed, state
from reqtable.http import HTTPRequestHandler, WebSocketHandler, route


class Shop(HTTPRequestHandler):
    state_version: ClassVar[int] = {version}
    body_bytes_max: ClassVar[int] = 2**31

    size: int = 0
    crc: int = 0
    left: int = 0

    @classmethod
    def migrate(cls, version, state, fields):
        return state, fields

    def on_head(self):
        self.size = self.crc = 0
        return self.read_body()

    def on_body(self, piece):
        self.size += len(piece)
        self.crc = zlib.crc32(piece, self.crc)
        return self.read_body()

    @route("GET", "/echo/{{text}}")
    def echo(self, text):
        return self.answer(200, text)

    @route("GET", "/give/{{pieces}}")
    def begin(self, pieces):
        self.left = int(pieces)
        self.begin_answer(200, length=self.left * {piece})
        return self.give, flushed()

    @state()
    def give(self, _):
        if not self.left:
            return self.end_answer()
        self.left -= 1
        self.write((b"%d." % self.left * {piece})[:{piece}])
        return self.give, flushed()

    @route("POST", "/take")
    def take(self):
        return self.answer(200, "%d %d" % (self.size, self.crc))


class Echo(WebSocketHandler):
    state_version: ClassVar[int] = {version}

    count: int = 0

    @classmethod
    def migrate(cls, version, state, fields):
        return state, fields

    def on_message(self, message):
        self.count += 1
        self.send_text("%d %s" % (self.count, message))
'''

_STATES = ("ask", "body", "give", "rest")


def names_of(version: int) -> dict[str, str]:
    """Return the names that a version has for the states: a version renames all states of the one before it."""
    return {name: name if version % 2 else f"{name}_now" for name in _STATES}


def write_ledger(path: Path, version: int) -> None:
    """Write a version of Ledger, whose list is a tuple, whose states have other names, and that has another field."""
    names = names_of(version)
    others = {other: names[name] for name, other in names_of(version + 1).items()}
    values = {
        "version": version,
        "kind": "tuple" if version % 2 else "list",
        "annotation": "tuple[int, ...]" if version % 2 else "list[int]",
        "added": f"mark_{version}: int = 0",
        "piece": PIECE_BYTES,
        "names": others,
    }
    _write(path, LEDGER.format(**values, **names))


def write_http(path: Path, version: int) -> None:
    _write(path, HTTP.format(version=version, piece=PIECE_BYTES))


def _write(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)  # a process that starts never reads half of it
