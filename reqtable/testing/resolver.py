"""Names on a simulated network, and the `getaddrinfo` that looks them up."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from reqtable.testing.connecting import WRONG_HOSTS
from reqtable.testing.wires import Network

_PROTOCOLS = {socket.SOCK_STREAM: socket.IPPROTO_TCP, socket.SOCK_DGRAM: socket.IPPROTO_UDP}
_KINDS = (socket.SOCK_STREAM, socket.SOCK_DGRAM)
_ERRORS = (socket.EAI_AGAIN, socket.EAI_NONAME, socket.EAI_FAIL)
_SLOW_MS = 3000
_KNOWN = {"localhost": ("::1", "127.0.0.1")}


class Resolver:
    """Looks names up, as slowly and as wrongly as the dice say. `names` has the addresses of each name, in order."""

    def __init__(self, network: Network, names: Mapping[str, Sequence[str]]) -> None:
        self.names: dict[str, Sequence[str]] = {**_KNOWN, **names}
        self.has_failed = False  # because of a fault
        self._network = network

    def getaddrinfo(
        self, host: Any, port: Any, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0
    ) -> list[tuple[Any, ...]]:
        """Return what `socket.getaddrinfo` returns. Raises socket.gaierror."""
        number = 0 if port is None else int(port)
        found = []
        for address in self._addresses(host, flags):
            is_six = ":" in address
            its_family = socket.AF_INET6 if is_six else socket.AF_INET
            if family in (0, its_family):
                where = (address, number, 0, 0) if is_six else (address, number)
                found += [(its_family, kind, _PROTOCOLS[kind], "", where) for kind in _KINDS if type in (0, kind)]
        if not found:
            raise gaierror(socket.EAI_NONAME)
        return found

    def _addresses(self, host: Any, flags: int) -> Sequence[str]:
        if host is None:
            return ["::", "0.0.0.0"] if flags & socket.AI_PASSIVE else _KNOWN["localhost"]
        name = host.decode() if isinstance(host, bytes) else host
        try:
            return [str(ipaddress.ip_address(name))]
        except ValueError:
            pass
        if flags & socket.AI_NUMERICHOST:
            raise gaierror(socket.EAI_NONAME)
        return list(self._looked_up(name))

    def _looked_up(self, name: str) -> Iterator[str]:
        network, dice = self._network, self._network.dice
        if network.spent_s is None:
            network.complaints.append(f"the name {name!r} was looked up in the loop, which stood still meanwhile")
        elif dice.happens("slow_lookup", "names"):
            network.spent_s += (1 + dice.draw("looked up for", "names", _SLOW_MS)) / 1000
        if dice.happens("unresolved", "names"):
            self.has_failed = True
            raise gaierror(_ERRORS[dice.draw("errno", "names", len(_ERRORS))])
        known = self.names.get(name)
        if known is None:
            raise gaierror(socket.EAI_NONAME)
        if known and dice.happens("misdirected", "names"):
            yield WRONG_HOSTS[socket.AF_INET6 if ":" in known[0] else socket.AF_INET][dice.draw("wrong", "names", 2)]
        yield from known


def gaierror(number: int) -> socket.gaierror:
    """Return the error of a name that can't be looked up."""
    texts = {
        socket.EAI_AGAIN: "Temporary failure in name resolution",
        socket.EAI_FAIL: "Non-recoverable failure in name resolution",
    }
    return socket.gaierror(number, texts.get(number, "Name or service not known"))
