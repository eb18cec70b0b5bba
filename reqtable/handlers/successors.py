"""Which states may follow a state, and which wait for what a transition names: read from the code of the methods."""

from __future__ import annotations

import dis
from collections.abc import Iterable, Iterator
from types import FunctionType

READS = ("LOAD_ATTR", "LOAD_METHOD")


def successors(cls: type, name: str, names: set[str]) -> tuple[str | None, ...]:
    """Return the states to which method `name` can lead, by its code and that of the methods of `self` it uses."""
    found: list[str | None] = []
    for method, instructions in _methods(cls, [name], names):
        for before, each in zip([None, *instructions], instructions, strict=False):
            if each.opname in READS and each.argval in names and each.argval not in found:
                found.append(each.argval)
            # Code that can't reach its end has no implicit `return None`, so this finds only methods that may end.
            returns_none = each.opname == "RETURN_CONST" and each.argval is None
            if each.opname == "RETURN_VALUE" and before is not None and before.opname == "LOAD_CONST":
                returns_none = before.argval is None
            if returns_none and method == name and None not in found:
                found.append(None)
    return tuple(sorted((f for f in found if f), key=str)) + ((None,) if None in found else ())


def named_with_a_want(cls: type, names: set[str]) -> set[str]:
    """Return the states that some transition names together with a want, as in `return self.saved, call(save)`."""
    found = set()
    for _, instructions in _methods(cls, names, names):
        named = ""
        for before, each in zip([None, *instructions], instructions, strict=False):
            if each.opname in READS and each.argval in names:
                named = each.argval
            elif each.opname == "RETURN_VALUE":
                if named and before is not None and (before.opname, before.arg) == ("BUILD_TUPLE", 2):
                    found.add(named)
                named = ""
    return found


def _methods(cls: type, begun: Iterable[str], names: set[str]) -> Iterator[tuple[str, list[dis.Instruction]]]:
    """Yield the methods `begun`, and the methods of `self` that these use, each with its code. No state is followed."""
    seen = set()
    waiting = [*begun]
    while waiting:
        method = waiting.pop(0)
        function = getattr(cls, method, None)
        if method in seen or not isinstance(function, FunctionType):
            continue
        seen.add(method)
        instructions = list(dis.get_instructions(function))
        yield method, instructions
        read = [each.argval for each in instructions if each.opname in READS and isinstance(each.argval, str)]
        waiting += [each for each in read if each not in names and isinstance(getattr(cls, each, None), FunctionType)]
