"""The lines that show everything about one request: of `reqtable show`, and of a page of `reqtable top`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from reqtable.run.commands import shown


def detail_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines that show everything about one request."""
    fields, stack = found.get("fields"), found.get("stack")
    words = [
        (name.removesuffix("_s"), _detail_text(name, value))
        for name, value in found.items()
        if name not in ("calls", "fields", "stack") and (name, value) != ("thread", None)
    ]
    yield from shown.pairs(words)
    for each in found.get("calls", ()):
        yield f"{shown.text(each['call'])} on {shown.text(each['on'])}: {each['phase']}"
        yield f"  asked for {shown.age(each['age_s'])} ago by {shown.text(each['asked_by'])}"
    if fields:
        yield "fields"
        yield from shown.pairs(((shown.text(name), shown.text(value)) for name, value in fields.items()), "  ")
    if stack:
        yield "stack, the innermost line last"
        yield from (f"  {shown.text(line)}" for line in stack)


def _detail_text(name: str, value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(shown.text, value)) or "-"
    if name == "input_head":
        return repr(value.encode("latin-1"))[1:] if value else "-"
    return shown.age(value) if name.endswith("_s") else shown.text(value)
