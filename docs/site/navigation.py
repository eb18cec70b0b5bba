"""The navigation of a folder of pages: the chapters of its `index.md`, and the pages in their tables."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent


def expanded(navigation: list[Any]) -> list[Any]:
    """Return a navigation in which each folder is replaced by its pages."""
    return [
        {title: _pages(place) if isinstance(place, str) and place.endswith("/") else place}
        for part in navigation
        for title, place in part.items()
    ]


def _pages(folder: str) -> list[Any]:
    """Return the pages of a folder by the chapters of its `index.md`; those before the first chapter stand alone."""
    found: list[Any] = [f"{folder}index.md"]
    top, *chapters = re.split(r"^## ", (DOCS / folder / "index.md").read_text(), flags=re.MULTILINE)
    found += _linked(folder, top)
    for chapter in chapters:
        if pages := _linked(folder, chapter):
            found.append({chapter.partition("\n")[0]: pages})
    return found


def _linked(folder: str, text: str) -> list[str]:
    """Return the pages of the folder to which the rows of a table link."""
    rows = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    return [f"{folder}{name}" for name in re.findall(r"\]\(([\w-]+\.md)\)", rows)]
