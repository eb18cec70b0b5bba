"""How many requests each server has, and which requests come from which network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from reqtable.table.addresses import network_of


class _Counted(Protocol):
    peer: Any

    @property
    def server(self) -> object: ...


T = TypeVar("T", bound=_Counted)


class Census(Generic[T]):
    """Knows the requests of a table by their servers and networks, so that nothing else must look at all of them."""

    def __init__(self) -> None:
        self.networks: dict[str, list[T]] | None = None  # None: not known, because no limit needs them
        self._of_server: Counter[int] = Counter()  # by the id() of the server

    def count_of(self, server: object) -> int:
        """Return the number of requests of a server."""
        return self._of_server[id(server)]

    def neighbours(self, peer: Any) -> Sequence[T]:
        """Return the requests from the network of a peer; none if networks are not known."""
        return () if self.networks is None else self.networks.get(network_of(peer) or "", ())

    def know_networks(self, entries: Iterable[T] | None) -> None:
        """Know the networks of `entries`, which are all there are, and of those that come. None: know no networks."""
        if entries is None:
            self.networks = None
            return
        self.networks = {}
        for entry in entries:
            self._add_to_network(self.networks, entry)

    def add(self, entry: T) -> None:
        self._of_server[id(entry.server)] += 1
        if self.networks is not None:
            self._add_to_network(self.networks, entry)

    def remove(self, entry: T) -> None:
        self._of_server[id(entry.server)] -= 1
        if self.networks is not None and (network := network_of(entry.peer)) is not None:
            self.networks[network].remove(entry)
            if not self.networks[network]:
                del self.networks[network]

    @staticmethod
    def _add_to_network(networks: dict[str, list[T]], entry: T) -> None:
        if (network := network_of(entry.peer)) is not None:
            networks.setdefault(network, []).append(entry)
