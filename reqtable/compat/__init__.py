"""Runs programs written for `socketserver`, unmodified: `python -m reqtable.compat run script.py`.

The program runs in a new interpreter. The first folder on its import path has a `socketserver.py` of reqtable. So all
modules that import `socketserver`, such as `http.server` and `xmlrpc.server`, get the server classes of reqtable. The
same goes for Python programs that the program starts, as development servers do when a file changes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

REPLACEMENT = Path(__file__).parent / "replacement"


def environment(dispatch: str | None = None, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return environment variables with which a Python program imports the replacement of `socketserver`.

    `dispatch` names the policy of all servers of the program. The variables are added to `base`, by default to those of
    this process.
    """
    made = dict(os.environ if base is None else base)
    path = made.get("PYTHONPATH")
    made["PYTHONPATH"] = f"{REPLACEMENT}{os.pathsep}{path}" if path else str(REPLACEMENT)
    if dispatch is not None:
        made["REQTABLE_DISPATCH"] = dispatch
    return made
