"""Finding code by what people write, `module:name` or `path/to/file.py:name`, and saying where in it an error is."""

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


_importing: list[str] = []  # the places that `module_at` is at


def check_not_importing() -> None:
    """Raise ConfigurationError in a module that `module_at` is importing: what serves must not be part of that."""
    if _importing:
        raise ConfigurationError('serve() is called by the import: put it under if __name__ == "__main__":')


def module_at(place: str) -> Any:
    """The module of that name, looked for in the working directory too, or the one in that `.py` file.

    A file's module is known by the file's name from then on, so that what it defines can be pickled. The file's folder
    is first on the path, as where Python runs the file, so it can import what lies beside it.
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
    """What `module:name` names; the name may have dots. Raises ImportError or AttributeError."""
    place, _, name = reference.rpartition(":")
    thing = module_at(place)
    for part in name.split("."):
        thing = getattr(thing, part)
    return thing


def account_of(error: BaseException) -> str:
    """`Type: message (file:line)` of an error in somebody's code: the line is of that code, not of a library it calls.

    Without a place where no such code is to blame: there is no such module, or it has no such name.
    """
    if isinstance(error, SyntaxError) and error.filename is not None:
        place, message = f"{error.filename}:{error.lineno}", error.msg
    else:
        place, message = _place_of(error.__traceback__), " ".join(str(error).split())
    if re.search(r"\(\S+:\d+\)$", message):
        place = ""  # it is told already
    return f"{type(error).__name__}: {message}" + (f" ({place})" if place else "")


def _place_of(caught: TracebackType | None) -> str:
    """The innermost line of the program's own code; if there is none, of a package that it uses."""
    places = {}  # by whether it is a package's
    traceback = caught and caught.tb_next  # the first line is that of the caller, who has caught it
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if is_of_program(file):
            places[_is_installed(file)] = f"{file}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return places.get(False) or places.get(True) or ""


def is_of_program(file: str) -> bool:
    """Whether a file's code is the program's or a package's that it uses, not ours nor the standard library's."""
    standard = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib"))
    return not file.startswith(("<", _OWN)) and (_is_installed(file) or not file.startswith(standard))


def _is_installed(file: str) -> bool:
    """Packages are installed below the standard library's folder."""
    return any(each in file for each in _INSTALLED)
