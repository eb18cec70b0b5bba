"""`start_tls()` without a handshake, for requests whose peers a test plays. Needs the module ssl."""

from __future__ import annotations

from reqtable.net.handshake import BegunTLS
from reqtable.table.table import Entry


class BegunAtOnce(BegunTLS):
    """Is encrypted, or refused, as soon as the handshake would begin. No byte is encrypted."""

    __slots__ = ()

    def is_encrypted(self, side: Entry) -> bool:
        return bool(side.transport.request.is_encrypted)

    def shake_hands(self, side: Entry) -> None:
        wire = side.transport.request
        if wire.datagrams:
            super().shake_hands(side)  # refuses
        elif wire.tls_refusal is None:
            wire.is_encrypted = True
            self._is_done = True
        else:
            self._failed(wire.tls_refusal)
