"""`Hosted`: what an engine needs of its servers beyond the hooks of `socketserver`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

from reqtable.dispatch.policy_set import PolicySet
from reqtable.net.preamble import PreambleSpec
from reqtable.server.stats import Counts
from reqtable.table.addresses import address_text
from reqtable.table.parts import Server


class Hosted(Server, Protocol):
    """Describes a server as its engine sees it. `LoopServer` is the implementation."""

    socket: Any
    _counts: Counts
    _policies: PolicySet
    _preamble: PreambleSpec | None  # what connections begin with; None: with the request itself
    _is_draining: bool  # answers tell their clients that no other will follow, as by `Connection: close`
    _owns_queue: bool  # no other process and no other descriptor listens on the same socket
    _is_left_non_blocking: bool  # the listening socket: it was blocking before the loop used it

    @property
    def _begins_with_tls(self) -> bool: ...

    def get_request(self) -> tuple[Any, Any]: ...
    def verify_request(self, request: Any, client_address: Any) -> Any: ...
    def _handle_request_noblock(self) -> bool: ...
    def _prepare(self) -> None: ...
    def _abandon_policies(self) -> None: ...
    def _hook(self, name: str) -> Any: ...


def hosted(server: Server) -> Hosted:
    """Return the server of an entry as the `Hosted` that it is: an engine hosts no other kind."""
    return cast(Hosted, server)


def server_at(servers: Sequence[Hosted], address: str) -> Hosted | None:
    """Return the server that takes the place of one at `address`: the server that is there, or else the only one."""
    at = [each for each in servers if address_text(each.server_address) == address]
    found = at or (servers if len(servers) == 1 else [])
    return found[0] if found else None
