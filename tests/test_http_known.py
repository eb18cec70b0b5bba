"""What HTTP remembers of texts that come again and again."""

from __future__ import annotations

from typing import Any

import pytest

from reqtable.http.known import CHARACTERS_MAX, Known


@pytest.fixture
def made() -> list[Any]:
    return []


@pytest.fixture
def known(made: list[Any]) -> Known[Any, int]:
    def make(key: Any) -> int:
        if key == "bad":
            raise ValueError("it is bad")
        made.append(key)
        return len(made)

    return Known(make, 3)


@pytest.mark.parametrize("key", ["a", ("a", "b"), 7, "x" * CHARACTERS_MAX])
def test_a_short_key_is_made_once(known: Known[Any, int], made: list[Any], key: Any) -> None:
    assert [known[key], known[key]] == [1, 1]
    assert made == [key]


@pytest.mark.parametrize("key", ["x" * (CHARACTERS_MAX + 1), ("a", "x" * CHARACTERS_MAX)])
def test_a_long_key_is_not_remembered(known: Known[Any, int], made: list[Any], key: Any) -> None:
    assert [known[key], known[key]] == [1, 2]
    assert not known


def test_what_is_refused_is_not_remembered(known: Known[Any, int]) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="it is bad"):
            known["bad"]
    assert not known


def test_all_are_forgotten_when_there_are_too_many(known: Known[Any, int], made: list[Any]) -> None:
    for key in ("a", "b", "c", "d", "a"):
        known[key]
        assert len(known) <= 3
    assert made == ["a", "b", "c", "d", "a"]
    assert [*known] == ["d", "a"]
