"""The keyboard of `reqtable top`: single keys, as names, from a terminal that does not echo them."""

from __future__ import annotations

import codecs
import os
import select
import termios
from contextlib import suppress
from typing import Any

_ESCAPE_S = 0.05  # how long the rest of an escape sequence may take; a lone escape is the key
_READ_BYTES = 4096

_NAMES = {
    "\r": "enter",
    "\n": "enter",
    "\x7f": "backspace",
    "\b": "backspace",
    "\x03": "ctrl-c",
    "\x15": "ctrl-u",
}
# What follows `ESC [` or `ESC O` (ECMA-48, and the terminals of xterm's kind).
_SEQUENCES = {
    "A": "up",
    "B": "down",
    "H": "home",
    "1~": "home",
    "7~": "home",
    "5~": "page-up",
    "6~": "page-down",
    "M": "enter",  # of the number pad
}


def keys_of(text: str) -> tuple[list[str], str]:
    """Return the keys in what a terminal sent, and the beginning of a sequence that is not complete.

    A key is a name or a character. A sequence that means nothing here is left out.
    """
    keys = []
    place = 0
    while place < len(text):
        if text[place] != "\x1b":
            keys.append(_NAMES.get(text[place], text[place]))
            place += 1
            continue
        if place + 1 == len(text):
            break
        if text[place + 1] not in "[O":
            keys.append("escape")
            place += 1
            continue
        end = place + 2
        while end < len(text) and not "@" <= text[end] <= "~":
            end += 1
        if end == len(text):
            break
        key = _SEQUENCES.get(text[place + 2 : end + 1])
        keys += [] if key is None else [key]
        place = end + 1
    return keys, text[place:]


class Keyboard:
    """Reads keys while it is entered. Restores the terminal when it is left, however that happens."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._before: list[Any] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may come in two pieces

    def __enter__(self) -> Keyboard:
        self._before = termios.tcgetattr(self.descriptor)
        mode = termios.tcgetattr(self.descriptor)
        mode[0] &= ~(termios.IXON | termios.ICRNL)
        mode[3] &= ~(termios.ICANON | termios.ECHO | termios.ISIG | termios.IEXTEN)
        mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
        termios.tcsetattr(self.descriptor, termios.TCSADRAIN, mode)
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(termios.error):  # the terminal has gone
            termios.tcsetattr(self.descriptor, termios.TCSAFLUSH, self._before)

    def read(self) -> list[str]:
        """Return the keys that were pressed. Call it when the descriptor is readable.

        Raises EOFError, or OSError, if the terminal has gone.
        """
        keys, rest = keys_of(self._text())
        while rest:
            if not select.select([self.descriptor], [], [], _ESCAPE_S)[0]:
                return [*keys, "escape"]
            more, rest = keys_of(rest + self._text())
            keys += more
        return keys

    def _text(self) -> str:
        data = os.read(self.descriptor, _READ_BYTES)
        if not data:
            raise EOFError("the terminal has gone")
        return self._decoder.decode(data)
