"""Imports code by a string, `module:name` or `path/to/file.py:name`, and says where in that code an error is."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import sysconfig
from pathlib import Path
from types import TracebackType
from typing import Any

from reqtable.table.errors import ConfigurationError

_OWN = str(Path(__file__).parent.parent) + os.sep
_INSTALLED = ("site-packages", "dist-packages")


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


def thing_at(reference: str) -> Any:
    """Import and return what `module:name` names. The name may have dots. Raises ImportError or AttributeError."""
    place, _, name = reference.rpartition(":")
    thing = module_at(place)
    for part in name.split("."):
        thing = getattr(thing, part)
    return thing


def account_of(error: BaseException) -> str:
    """Describe an error in the user's code as `Type: message (file:line)`, with the innermost line of that code.

    If no line of that code is to blame (the module or the name does not exist), the place is left out.
    """
    if isinstance(error, SyntaxError) and error.filename is not None:
        place, message = f"{error.filename}:{error.lineno}", error.msg
    else:
        place, message = _place_of(error.__traceback__), " ".join(str(error).split())
    if re.search(r"\(\S+:\d+\)$", message):
        place = ""  # the message has a place already
    return f"{type(error).__name__}: {message}" + (f" ({place})" if place else "")


def _place_of(caught: TracebackType | None) -> str:
    """Return the innermost line of the program's own code, or if there is none, of a package that it uses."""
    places = {}  # keyed by whether the file is a package's
    traceback = caught and caught.tb_next  # the first frame is the one that caught the error
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if is_of_program(file):
            places[_is_installed(file)] = f"{file}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return places.get(False) or places.get(True) or ""


def is_of_program(file: str) -> bool:
    """Return whether a file belongs to the program or to a package it uses, not to us or the standard library."""
    standard = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib"))
    return not file.startswith(("<", _OWN)) and (_is_installed(file) or not file.startswith(standard))


def _is_installed(file: str) -> bool:
    """Return whether a file is an installed package's. These are below the standard library's folder."""
    return any(each in file for each in _INSTALLED)
