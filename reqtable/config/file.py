"""A configuration file in TOML: its values, the line of each value, and errors for unknown keys."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from reqtable.config.options import hints
from reqtable.config.unknown_keys import key_meant, mend_of_key
from reqtable.table.errors import ConfigurationError

OWN_FILE = "reqtable.toml"
PROJECT_FILE = "pyproject.toml"


class File:
    """Reads one file, and finds the lines of its keys."""

    def __init__(self, path: Path) -> None:
        import tomllib  # only reading a file needs it

        self.name = str(path)
        try:
            self._text = path.read_text("utf-8")
        except OSError as error:
            raise ConfigurationError(f"{path}: {(error.strerror or str(error)).lower()}") from error
        except UnicodeDecodeError as error:
            raise ConfigurationError(f"{path}: not TOML: {error}: save it as UTF-8") from error
        try:
            document = tomllib.loads(self._text)
        except tomllib.TOMLDecodeError as error:
            said = _null_in(self._text, str(error)) or f": not TOML: {_plain(error)}"
            raise ConfigurationError(f"{path}{said}") from error
        self.problems: list[ConfigurationError] = []  # what is wrong with the values
        self.prefix = ("tool", "reqtable") if path.name == PROJECT_FILE else ()
        self.table: Any = document
        for key in self.prefix:
            self.table = self.table.get(key) if isinstance(self.table, dict) else None

    def place(self, key: tuple[str, ...]) -> str:
        """Return `file:line` of a key, or the file alone if the line can't be found."""
        line = _line_of(self._text, self.prefix + key)
        return f"{self.name}:{line}" if line else self.name


def values_of(kind: Any, file: File, origins: dict[str, str]) -> dict[str, Any]:
    """Return the values of the file, by the fields of `kind`. Calling `kind` will check the types of its own fields.

    Raises ConfigurationError: one line with everything that is wrong with the keys and the tables.
    """
    values = _values(kind, file.table, (), file, origins)
    if file.problems:
        first, *more = file.problems
        raise ConfigurationError("; ".join(map(str, file.problems))) if more else first
    return values


def _values(kind: Any, table: Any, key: tuple[str, ...], file: File, origins: dict[str, str]) -> dict[str, Any]:
    """Return the values of a table of the file, without the keys that there are not. Notes what is wrong."""
    if not isinstance(table, dict):
        _note_no_table(table, key, file)
        return {}
    types = {name: hint for name, hint in hints(kind).items() if name != "origins"}
    values = {}
    for name, value in table.items():
        here = (*key, name)
        if name not in types:
            mend = mend_of_key(name, types) if key else _mend_without_table(name, types, kind)
            text = f"{file.place(here)}: there is no key {_dotted(here)} (= {value!r}): {mend}"
            file.problems.append(ConfigurationError(text))
        else:
            values[name] = _value(types[name], value, here, file, origins)
    return values


def _mend_without_table(name: str, types: Collection[str], root: Any) -> str:
    """Return how to mend a key that is in no table of the file."""
    table, near = key_meant(name, root) or (None, "")
    if table is None:
        return mend_of_key(name, types)
    return f"it belongs under [{table}]" if near == name else f"did you mean {near} under [{table}]?"


def _note_no_table(value: Any, key: tuple[str, ...], file: File) -> None:
    text = f"{file.place(key)}: {_dotted(key) or 'reqtable'} must be a table, not {value!r}"
    file.problems.append(ConfigurationError(text))


def _value(hint: Any, value: Any, key: tuple[str, ...], file: File, origins: dict[str, str]) -> Any:
    if is_dataclass(hint):
        return _made(hint, value, key, file, origins)
    if get_origin(hint) is Mapping and is_dataclass(kind := get_args(hint)[1]):
        if not isinstance(value, dict):
            _note_no_table(value, key, file)
            return {}
        return {name: _made(kind, each, (*key, name), file, origins) for name, each in value.items()}
    origins[_dotted(key)] = file.place(key)
    return tuple(value) if get_origin(hint) is tuple and isinstance(value, list) else value


def _made(kind: Any, table: Any, key: tuple[str, ...], file: File, origins: dict[str, str]) -> Any:
    """Return an object of `kind` made from its table; None if something is wrong with it, which is noted.

    A problem with a value names the place of its key.
    """
    known = len(file.problems)
    values = _values(kind, table, key, file, origins)
    if len(file.problems) > known:
        return None
    try:
        return kind(**values)
    except (ValueError, ConfigurationError) as error:
        [at, *_] = [name for name in values if re.search(rf"\b{name}\b", str(error))] or [""]
        file.problems.append(ConfigurationError(f"{file.place((*key, at) if at else key)}: {error}"))
        return None


def _plain(error: Exception) -> str:
    """Return the text of an error of the TOML parser, with tables as they are written in the file."""

    def written(found: re.Match[str]) -> str:
        parts = re.findall(r"'([^']*)'", found[0])
        return f"[{'.'.join(parts)}]"

    return re.sub(r"\(('[^']*',? ?)+\)", written, str(error))


def _null_in(text: str, problem: str) -> str:
    """Return the rest of a message if the line that a `problem` names has `null`, which TOML lacks; else ""."""
    at = re.search(r"at line (\d+)", problem)
    line = text.split("\n")[int(at[1]) - 1] if at is not None else ""
    found = re.match(r"\s*([\w.-]+)\s*=\s*(null|None|nil)\s*(#|$)", line)
    return "" if at is None or found is None else f":{at[1]}: TOML has no {found[2]}: leave {found[1]} out"


def _dotted(key: tuple[str, ...]) -> str:
    return ".".join(key)


def _line_of(text: str, key: tuple[str, ...]) -> int | None:
    """Return the number of the line that sets a key or begins its table. None if this simple search finds no line."""
    if '"""' in text or "'''" in text:
        return None  # a line of a string may look like a key
    table: tuple[str, ...] = ()
    opened = None
    for number, line in enumerate(text.split("\n"), 1):
        if header := re.match(r"\s*\[([^\[\]]+)\]", line):
            table = _parts(header[1])
            if opened is None and table[: len(key)] == key:
                opened = number
        elif assignment := re.match(r"""\s*([\w.\-"' ]+?)\s*=""", line):
            given = table + _parts(assignment[1])
            if given == key or key[: len(given)] == given:  # the key itself, or the inline table that it is in
                return number
    return opened


def _parts(dotted: str) -> tuple[str, ...]:
    parts = re.findall(r"""\s*("[^"]*"|'[^']*'|[^."']+)""", dotted)
    return tuple(part.strip().strip("\"'") for part in parts)
