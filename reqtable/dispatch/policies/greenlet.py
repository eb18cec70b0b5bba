"""Policy `greenlet`: unmodified blocking handlers, interleaved on one thread.

Each request's handler runs in a greenlet, suspended where a call on its own socket would block (see `cooperative`).
Resumable handlers run as under `inline`, and then the package greenlet is not needed.

What still blocks everyone: whatever does not go through the request's own socket, such as `time.sleep`, a socket that
the handler opens, or a lock held across a read.
"""

from __future__ import annotations

from typing import Any

from reqtable.dispatch.policy import Policy, is_resumable
from reqtable.net.transports import Lent
from reqtable.table.errors import ConfigurationError
from reqtable.table.table import Entry, Resumable

# Imported with the package, not when a server is first made: a program's tests may have patched `socket.socket` by
# then, and the classes of these modules would be built on the patch.
try:
    from reqtable.dispatch.green import socket as cooperative
except ImportError:  # there is no greenlet
    cooperative = None  # type: ignore[assignment]
try:
    from reqtable.dispatch.green import tls as cooperative_tls
except ImportError:  # there is no greenlet, or no ssl
    cooperative_tls = None  # type: ignore[assignment]


def policy_for_blocking() -> str:
    """The policy under which a blocking handler that waits for its client holds up no other."""
    return "greenlet" if cooperative is not None else "thread"


def defer_handshakes() -> None:
    """Make the TLS handshake of a connection part of its request. Without greenlet it stays part of accepting."""
    if cooperative_tls is not None:
        cooperative_tls.install()


class Greenlet(Policy):
    name = "greenlet"

    @classmethod
    def check(cls, handler_class: Any) -> None:
        if is_resumable(handler_class):
            return
        if cooperative is None:
            raise ConfigurationError(
                "dispatch policy 'greenlet' needs the package greenlet for a blocking handler: pip install greenlet"
            )
        defer_handshakes()

    def lend(self, request: Any) -> Lent:
        if isinstance(request, cooperative.CooperativeSocket):  # a TLS socket that `get_request` made
            request.lent.request = request
            return request.lent
        if type(request) is not self.engine.system.socket:
            return super().lend(request)
        own = cooperative.cooperative(type(request)).over(request)  # type: ignore[arg-type]
        lent = own.lent = Lent(self.engine, own)
        return lent

    def secured(self, entry: Entry, request: Any, context: Any) -> Any:
        if is_resumable(entry.server.RequestHandlerClass):
            return super().secured(entry, request, context)
        return cooperative_tls.secured(self.engine, request, context)

    def blocking(self, entry: Entry, lent: Lent) -> Resumable:
        return cooperative.Suspendable(self, lent)
