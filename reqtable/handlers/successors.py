"""Which states may follow a state, read from the code of its method."""

from __future__ import annotations

import dis
from types import FunctionType


def successors(cls: type, name: str, names: set[str]) -> tuple[str | None, ...]:
    """Return the states to which method `name` can lead, by its code and that of the methods of `self` it uses."""
    found: list[str | None] = []
    seen = set()
    waiting = [name]
    while waiting:
        method = waiting.pop(0)
        function = getattr(cls, method, None)
        if method in seen or not isinstance(function, FunctionType):
            continue
        seen.add(method)
        instructions = list(dis.get_instructions(function))
        for before, each in zip([None, *instructions], instructions, strict=False):
            if each.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(each.argval, str):
                if each.argval in names:
                    if each.argval not in found:
                        found.append(each.argval)
                elif isinstance(getattr(cls, each.argval, None), FunctionType):
                    waiting.append(each.argval)
            # Code that can't reach its end has no implicit `return None`, so this finds only methods that may end.
            returns_none = each.opname == "RETURN_CONST" and each.argval is None
            if each.opname == "RETURN_VALUE" and before is not None and before.opname == "LOAD_CONST":
                returns_none = before.argval is None
            if returns_none and method == name and None not in found:
                found.append(None)
    return tuple(sorted((f for f in found if f), key=str)) + ((None,) if None in found else ())
