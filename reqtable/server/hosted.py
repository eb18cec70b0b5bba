"""What an engine asks of the servers that it hosts, beyond the hooks of `socketserver`."""

from __future__ import annotations

from typing import Any, Protocol, cast

from reqtable.dispatch.policy_set import PolicySet
from reqtable.net.preamble import PreambleSpec
from reqtable.server.stats import Counts
from reqtable.table.parts import Server


class Hosted(Server, Protocol):
    """A server on a loop. `LoopServer` is what its class derives from."""

    socket: Any
    _counts: Counts
    _policies: PolicySet
    _preamble: PreambleSpec | None  # what its connections begin with; None: with the request itself
    _owns_queue: bool  # nobody else listens on its socket, in another process or by another descriptor
    _is_left_non_blocking: bool  # its listening socket, which blocked before it was listened on

    @property
    def _begins_with_tls(self) -> bool: ...

    def get_request(self) -> tuple[Any, Any]: ...
    def verify_request(self, request: Any, client_address: Any) -> Any: ...
    def _handle_request_noblock(self) -> bool: ...
    def _prepare(self) -> None: ...
    def _abandon_policies(self) -> None: ...


def hosted(server: Server) -> Hosted:
    """The server of an entry: an engine hosts no other kind."""
    return cast(Hosted, server)
