"""The methods of a handler that answer requests: checked when the class is made, and named in errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from reqtable.handlers.resumable import check_called
from reqtable.handlers.transition import Transition
from reqtable.http.exchange import OWN_STATES, Exchange
from reqtable.http.routes import Routes
from reqtable.table.addresses import printable
from reqtable.table.errors import InvalidTransition
from reqtable.table.want import Want


class Methods(Exchange):
    """Knows the methods of a handler class, and blames the right one for a wrong transition."""

    _hooks = Exchange._hooks | {"respond": ("self",)}

    _routes: ClassVar[Routes]
    _methods: ClassVar[frozenset[str]] = frozenset()  # those of HTTP that have a `do_GET` or the like

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raise HandlerError if a method can't be called for its request."""
        super().__init_subclass__(**kwargs)
        cls._routes = Routes(cls, cls._awaiting)
        cls._methods = frozenset(name[3:] for name in dir(cls) if name.startswith("do_") and name[3:].isupper())
        for method in cls._methods:
            check_called(getattr(cls, f"do_{method}"), ("self",), awaiting=cls._awaiting)

    def respond(self) -> Transition:
        """Answer the request, which has come whole."""
        raise NotImplementedError

    def _request_line(self) -> str:
        """Return the method and the path of the request, for messages."""
        return f"{self.request.method} {printable(self.request.path)}"

    def _returns(self) -> str:
        return "self.answer(…), self.end_answer(), or the state that goes on"

    def _follow(self, transition: Transition, by: Callable[..., Any]) -> Want[Any] | None:
        """Take a transition as usual. One that is none is an error like any other: the client gets an answer."""
        try:
            return super()._follow(transition, by)
        except InvalidTransition as error:
            return super()._follow(self.on_error(error), self.on_error)

    def _source_of(self, by: Callable[..., Any]) -> tuple[str, str]:
        """Name the author's method in place of `respond`, and of a state of HTTP's own that has called `respond`."""
        if by.__name__ == "respond" or by.__name__ in OWN_STATES:
            by = self._responder()
        return super()._source_of(by)

    def _responder(self) -> Callable[..., Any]:
        """Return the method that answers the request."""
        if _is_ours(type(self).respond):
            method = self.request.method
            methods, _ = self._routes.find(self.request.path)
            for each in (method, "GET") if method == "HEAD" else (method,):
                serve: Callable[..., Any] | None = getattr(self, methods.get(each, f"do_{each}"), None)
                if serve is not None:
                    return serve
        return self.respond


def _is_ours(function: Callable[..., Any]) -> bool:
    return function.__module__.startswith(f"{__package__}.")
