"""Running programs that were written for `socketserver`, unmodified: `python -m reqtable.compat run script.py`.

The program runs in an interpreter of its own, on whose path a folder comes first that has another `socketserver.py`. So
whatever imports that module, `http.server` and `xmlrpc.server` included, has the server classes of reqtable. So have
the Python programs that it starts, such as those that a development server starts when a file changes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

REPLACEMENT = Path(__file__).parent / "replacement"


def environment(dispatch: str | None = None, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment variables for a Python program that shall have the replacement.

    `dispatch` names a policy for all of its servers, `base` is what else there is (by default this process's).
    """
    made = dict(os.environ if base is None else base)
    path = made.get("PYTHONPATH")
    made["PYTHONPATH"] = f"{REPLACEMENT}{os.pathsep}{path}" if path else str(REPLACEMENT)
    if dispatch is not None:
        made["REQTABLE_DISPATCH"] = dispatch
    return made
