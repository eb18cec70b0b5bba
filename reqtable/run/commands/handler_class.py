"""An argument of the command line that names a handler class."""

from __future__ import annotations

import functools
from typing import Any

import click

from reqtable.config.import_string import candidates_in, module_at
from reqtable.dispatch import is_resumable
from reqtable.run.served import is_server_class, is_server_function, takes_two, why_not_served
from reqtable.table.snapshot import unwrapped
from reqtable.table.tracebacks import account_of


class HandlerClass(click.ParamType[Any]):
    """Converts `module:Class` or `path/to/file.py:Class` to the handler class."""

    name = "module:Handler"
    kinds = "handlers"
    mend = (
        "is not a handler class: derive it from reqtable.StateRequestHandler, AsyncRequestHandler or BaseRequestHandler"
    )

    def accepts(self, thing: Any) -> bool:
        """Return whether `thing` is what the argument should be."""
        return _is_handler(thing)

    def cure(self, thing: Any, value: str, name: str) -> str:
        """Say what to do about `thing`, which is not accepted."""
        return f"{name} {self.mend}"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        place, colon, name = value.rpartition(":")
        if not colon or not place or not name:
            self.fail(f"{value!r}: write it as module:Handler or path/to/file.py:Handler")
        try:
            module = module_at(place)
        except SystemExit as error:
            self.fail(
                f"{value!r} ends the program when it is imported: {account_of(error)}: put what runs it under "
                'if __name__ == "__main__":'
            )
        except Exception as error:
            self.fail(f"{value!r} can't be imported: {account_of(error)}")
        handler = getattr(module, name, None)
        if handler is None:
            others = ", ".join(candidates_in(module, functools.partial(self._described, module.__name__))) or "none"
            self.fail(f"{value!r}: {place} has no {name}; {self.kinds} there: {others}")
        if not self.accepts(handler):
            self.fail(f"{value!r}: {why_not_served(handler, name) or self.cure(handler, value, name)}")
        return handler

    def _described(self, module: str, name: str, thing: Any) -> str | None:
        """Return the name of what the module itself has, and the argument can be."""
        is_own = getattr(thing, "__module__", None) == module
        return name if is_own and self.accepts(thing) and not is_server_function(thing) else None


class Served(HandlerClass):
    """Converts `module:name` to a handler class, a server class, or a function that makes a server."""

    name = "module:Handler"
    kinds = "handlers and servers"
    mend = (
        "is not a handler class, nor a server class: derive it from reqtable.StateRequestHandler, AsyncRequestHandler "
        "or BaseRequestHandler, or from a server class"
    )

    def cure(self, thing: Any, value: str, name: str) -> str:
        if takes_two(thing):
            return f"{name} is called with two arguments: if it is a WSGI application, run reqtable wsgi {value}"
        return super().cure(thing, value, name)

    def accepts(self, thing: Any) -> bool:
        return _is_handler(thing) or is_server_class(thing) or is_server_function(thing)


def _is_handler(thing: Any) -> bool:
    """Return whether `thing` is a handler class of any style, `socketserver`'s blocking ones included."""
    if not isinstance(unwrapped(thing), type) or is_server_class(thing):
        return False
    return is_resumable(thing) or all(callable(getattr(thing, hook, None)) for hook in ("setup", "handle", "finish"))
