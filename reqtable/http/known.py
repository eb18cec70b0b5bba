"""`Known`: remembers what a function has made of short texts that come again and again, such as the names of fields."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

K = TypeVar("K")
V = TypeVar("V")

CHARACTERS_MAX = 256


class Known(dict[K, V]):
    """Maps a text, a tuple of texts or a number to what `make` returns for it.

    It remembers at most `most` of them, none with more than `longest` characters, and only what `keeps`. A look-up is
    one operation of the interpreter: an `lru_cache` takes a call. The price is that all are forgotten at once when
    there are too many.
    """

    __slots__ = ("_keeps", "_longest", "_make", "_most")

    def __init__(
        self,
        make: Callable[[K], V],
        most: int,
        longest: int = CHARACTERS_MAX,
        keeps: Callable[[V], object] = lambda _: True,
    ) -> None:
        self._make = make
        self._most = most
        self._longest = longest
        self._keeps = keeps

    def __missing__(self, key: K) -> V:
        made = self._make(key)
        if _characters(key) <= self._longest and self._keeps(made):
            if len(self) >= self._most:
                self.clear()
            self[key] = made
        return made


def _characters(key: Any) -> int:
    return len(key) if type(key) is str else sum(map(len, key)) if type(key) is tuple else 0
