"""The optional C module. `REQTABLE_PURE=1` in the environment turns it off."""

from __future__ import annotations

import importlib
import os
from types import ModuleType


def _find() -> ModuleType | None:
    if os.environ.get("REQTABLE_PURE", "0") not in ("", "0"):
        return None
    try:
        return importlib.import_module("reqtable._lean")
    except ImportError:
        return None


lean: ModuleType | None = _find()
"""The C module, or None: then all of the package is Python."""
