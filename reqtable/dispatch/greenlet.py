"""Policy `greenlet`: unmodified blocking handlers, interleaved on one thread.

Each request's handler runs in a greenlet, suspended where a call on its own socket would block (see `cooperative`).
Resumable handlers run as under `inline`, and then the package greenlet is not needed.

What still blocks everyone: whatever does not go through the request's own socket, such as `time.sleep`, a socket that
the handler opens, or a lock held across a read.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from reqtable.core.errors import ConfigurationError
from reqtable.core.table import Entry, Resumable
from reqtable.dispatch.base import Policy, is_resumable
from reqtable.engine.transports import Lent


class Greenlet(Policy):
    name = "greenlet"

    @classmethod
    def check(cls, handler_class: Any) -> None:
        if is_resumable(handler_class):
            return
        try:
            import greenlet  # noqa: F401  # is it there?
        except ImportError as error:
            raise ConfigurationError(
                "dispatch policy 'greenlet' needs the package greenlet for a blocking handler: pip install greenlet"
            ) from error
        try:
            from reqtable.dispatch.cooperative_tls import install
        except ImportError:
            return  # there is no ssl here
        install()

    def lend(self, request: Any) -> Lent:
        sockets = self._cooperative
        if isinstance(request, sockets.CooperativeSocket):  # a TLS socket that `get_request` made
            return request.lent  # type: ignore[no-any-return]
        if type(request) is not self.engine.system.socket:
            return super().lend(request)
        own = sockets.cooperative(type(request)).over(request)
        lent = own.lent = Lent(self.engine, own)
        return lent

    def secured(self, entry: Entry, request: Any, context: Any) -> Any:
        if is_resumable(entry.server.RequestHandlerClass):
            return super().secured(entry, request, context)
        from reqtable.dispatch.cooperative_tls import secured

        return secured(self.engine, request, context)

    def blocking(self, entry: Entry, lent: Lent) -> Resumable:
        return self._cooperative.Suspendable(self, lent)  # type: ignore[no-any-return]

    @cached_property
    def _cooperative(self) -> Any:
        """The module that needs the package: an import in a function costs a microsecond each time."""
        from reqtable.dispatch import cooperative

        return cooperative
