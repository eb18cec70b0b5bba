"""Policy `greenlet`: unmodified blocking handlers, interleaved on one thread.

Each blocking handler runs in a greenlet, which is suspended when a call on the request's own socket would block (see
`green/socket.py`). Resumable handlers run as under `inline`; they don't need the package greenlet.

Whatever bypasses the request's own socket still blocks the loop, such as `time.sleep`, a socket that the handler opens,
or a lock held across a read. With the option `suspend_all_sockets`, the sockets that the handler opens, `select`,
`time.sleep` and name look-ups suspend the request too (`green/replacements.py`).
"""

from __future__ import annotations

import socket
from typing import Any

from reqtable.dispatch.checks import is_resumable
from reqtable.dispatch.policy import Host, Policy
from reqtable.loop.platform import SYSTEM
from reqtable.net.stream import send_at_once
from reqtable.table.errors import ConfigurationError
from reqtable.table.parts import Resumable
from reqtable.table.table import Entry

# Imported with the package, not when a server is first made. By then a program's tests may have patched
# `socket.socket`, and the classes of these modules would be built on the patch.
try:
    from reqtable.dispatch.green.handler import GreenHandler
    from reqtable.dispatch.green.socket import CooperativeSocket, cooperative
    from reqtable.dispatch.green.transport import GreenTransport

    has_greenlet = True
except ImportError:
    has_greenlet = False
try:
    from reqtable.dispatch.green import tls as green_tls
except ImportError:  # the package greenlet or the module ssl is missing
    green_tls = None  # type: ignore[assignment]


def policy_for_blocking() -> str:
    """Return the policy under which a blocking handler that waits for its client holds up no other request."""
    return "greenlet" if has_greenlet else "thread"


def defer_handshakes() -> None:
    """Make the TLS handshake of a connection part of its request. Without greenlet it stays part of accepting."""
    if green_tls is not None:
        green_tls.install()


class Greenlet(Policy):
    """Runs each blocking handler in a greenlet, on the loop's thread."""

    name = "greenlet"

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        # Whether each wait of a blocking handler suspends its request. A simulated selector can't watch real sockets.
        is_real = SYSTEM.get().policies is None
        self.suspends_all = has_greenlet and is_real and host.config.greenlet.suspend_all_sockets
        if self.suspends_all:
            from reqtable.dispatch.green import all_sockets  # only servers with the option need it

            all_sockets.REPLACEMENTS.install(self)

    @classmethod
    def check(cls, handler_class: Any) -> None:
        if is_resumable(handler_class):
            return
        if not has_greenlet:
            raise ConfigurationError(
                "dispatch policy 'greenlet' needs the package greenlet for a blocking handler: pip install greenlet"
            )
        defer_handshakes()

    def transport_for(self, request: Any) -> GreenTransport:
        if isinstance(request, CooperativeSocket):  # a TLS socket that `get_request` made
            request.transport.request = request
            request.transport.share = self.host.steps.table.limits.recv_bytes
            return request.transport
        if isinstance(request, socket.socket):
            send_at_once(request)
        if type(request) is not self.host.steps.system.socket:
            return GreenTransport(self.host.steps, request)
        own = cooperative(type(request)).over(request)  # type: ignore[arg-type]
        transport = own.transport = GreenTransport(self.host.steps, own)
        return transport

    def secured(self, entry: Entry, request: Any, context: Any) -> Any:
        if is_resumable(entry.server.RequestHandlerClass):
            return super().secured(entry, request, context)
        return green_tls.secured(self.host.steps, request, context)

    def blocking(self, entry: Entry, transport: GreenTransport) -> Resumable:  # type: ignore[override]
        return GreenHandler(transport)

    def close(self, wait: bool) -> None:
        if self.suspends_all:
            from reqtable.dispatch.green import all_sockets

            all_sockets.REPLACEMENTS.release(self)
