"""Has the reference show the comment behind a field as the text of the field, if the field has no text below it."""

from __future__ import annotations

import re
from typing import Any

from griffe import Attribute, Docstring, Extension

_COMMENT = re.compile(r"\s# (?!type:|noqa|fast path)(.+?)(?:  # .*)?$", re.MULTILINE)


class Comments(Extension):
    """Gives attributes their comments as texts."""

    def on_attribute_instance(self, *, attr: Attribute, **_: Any) -> None:
        """Take the comment of an attribute that has no text."""
        found = _COMMENT.search(attr.source)
        if attr.docstring is None and found is not None:
            text = found[1]
            attr.docstring = Docstring(f"{text[0].upper()}{text[1:]}.", lineno=attr.lineno, parent=attr)
