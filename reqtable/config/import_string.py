"""Imports code by a string, `module:name` or `path/to/file.py:name`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reqtable.table.errors import ConfigurationError

_importing: list[str] = []  # what `module_at` is importing now


def check_not_importing() -> None:
    """Raise ConfigurationError if `module_at` is importing a module: an import must not start to serve."""
    if _importing:
        raise ConfigurationError('serve() is called by the import: put it under if __name__ == "__main__":')


def module_at(place: str) -> Any:
    """Import the module of that name, also from the working directory, or the module in that `.py` file.

    The module of a file is registered under the file's name, so that its classes and functions can be pickled. The
    file's folder becomes the first on the path, as if Python ran the file, so that it can import its neighbours.
    """
    _importing.append(place)
    try:
        return _module_at(place)
    finally:
        _importing.pop()


def _module_at(place: str) -> Any:
    if not place.endswith(".py"):
        if "" not in sys.path:
            sys.path.insert(0, "")
        return importlib.import_module(place)
    path = Path(place).resolve()
    if not path.is_file():
        raise FileNotFoundError("there is no such file")
    if path.stem in sys.stdlib_module_names:
        raise ImportError(f"the standard library has a module {path.stem}: give the file another name")
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known  # a command may name several things of one file
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    if sys.path[:1] != [str(path.parent)]:
        sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


def candidates_in(module: Any, described: Callable[[str, Any], str | None]) -> list[str]:
    """Return, for a message, what `described(name, thing)` makes of each name of a module; None leaves a name out.

    A thing that can't be looked at is left out, too: a proxy of Flask raises an error outside of a request.
    """
    found = []
    for name, thing in list(vars(module).items()):
        try:
            text = described(name, thing)
        except Exception:
            continue
        if text is not None:
            found.append(text)
    return sorted(found)


def thing_at(reference: str) -> Any:
    """Import and return what `module:name` names. The name may have dots. Raises ImportError or AttributeError."""
    place, _, name = reference.rpartition(":")
    thing = module_at(place)
    for part in name.split("."):
        thing = getattr(thing, part)
    return thing
