"""Finding code by what people write: `module:name`, or `path/to/file.py:name`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any


def module_at(place: str) -> Any:
    """The module of that name, looked for in the working directory too, or the one in that `.py` file.

    A file's module is known by the file's name from then on, so that what it defines can be pickled.
    """
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
