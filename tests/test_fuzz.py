"""Bytes that no client should send: some hundred seeds of `make fuzz`, and a check that it finds bugs."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest

from reqtable.http import answer, wsgi_call
from reqtable.net.stream import Stream
from reqtable.table.input import Input
from reqtable.table.table import RequestTable
from tests.fuzz import TARGETS, fuzz
from tests.fuzz_http import SPLIT


@pytest.mark.slow
def test_some_hundred_connections_that_mean_no_good() -> None:
    assert fuzz(range(500)) == []


def fails(*args: Any) -> None:
    raise KeyError("a bug")


def does_nothing(*args: Any) -> None:
    pass


def is_forgotten(stream: Stream) -> None:
    stream.watch(0)


@pytest.mark.parametrize(
    ("owner", "method", "instead", "found"),
    [
        (Input, "exactly", fails, "handle_error: KeyError('a bug')"),
        (Stream, "_lost", fails, "handle_error: KeyError('a bug')"),
        (RequestTable, "remove", does_nothing, "left over"),
        (Stream, "release", is_forgotten, "never closed"),
    ],
)
def test_what_it_looks_for_is_found(
    owner: type, method: str, instead: Any, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, method, instead)
    monkeypatch.delenv("REQTABLE_DEBUG")  # the invariants would be the first to find it
    problems = fuzz(range(len(TARGETS) * 10))
    assert any(found in problem for problem in problems), problems


@pytest.mark.parametrize(("place", "name"), [("answer", "_VALUE"), ("wsgi_call", "_VALUE"), ("wsgi_call", "_STATUS")])
def test_an_answer_that_a_client_can_split_is_found(place: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Header fields and statuses that aren't checked: a client puts a field of its own into the answer."""
    module = importlib.import_module(f"reqtable.http.{place}")
    anything = re.compile(r"(?s)([0-9]{3}) .*" if name == "_STATUS" else r"(?s).*")
    monkeypatch.setattr(module, name, anything)
    try:
        problems = fuzz(range(len(TARGETS) * 100))
    finally:
        answer._status_line.cache_clear()
        for known in (answer._LINES, wsgi_call._STATUS_LINES, wsgi_call._FIELDS):
            known.clear()
    assert any(f"an answer has {SPLIT!r}" in problem for problem in problems), problems
