"""The state machines of the examples, each drawn from its `states()`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

from docs.site.drawing import drawn
from reqtable import StateRequestHandler
from reqtable.run.commands.inspect import as_dot

_EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def machines() -> str:
    """Return a part for each state machine of the examples."""
    return "\n\n".join(
        f"## {cls.__name__} {{ #{cls.__name__} }}\n\n`{cls.__module__.replace('.', '/')}.py`: "
        f"{(inspect.getdoc(cls) or '').splitlines()[0]}\n\n"
        f"{drawn(as_dot(cls.states()), f'The states of {cls.__name__}')}"
        for cls in _handlers()
    )


def _handlers() -> Iterator[type[StateRequestHandler]]:
    for path in sorted(_EXAMPLES.glob("*.py")):
        module = importlib.import_module(f"examples.{path.stem}")
        for cls in vars(module).values():
            if inspect.isclass(cls) and cls.__module__ == module.__name__ and issubclass(cls, StateRequestHandler):
                yield cls
