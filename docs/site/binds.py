"""The schemes of binds, from `OPTIONS`."""

from __future__ import annotations

from docs.site.texts import table
from reqtable.run.binds import OPTIONS


def binds() -> str:
    """Return the table of the schemes."""
    rows = ((f"`{scheme}://`", ", ".join(f"`{name}`" for name in names)) for scheme, names in OPTIONS.items())
    return table(("scheme", "options"), rows)
