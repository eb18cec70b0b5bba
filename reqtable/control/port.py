"""`PortServer`: a server of the control API on a TCP port."""

from __future__ import annotations

import socket
from typing import Any

from reqtable.config import Config
from reqtable.control.source import Source
from reqtable.server.classes import TCPServer
from reqtable.server.engine import Engine


class PortServer(TCPServer):
    """Lets everybody who can connect to `place`, such as "127.0.0.1:9100", ask what `handler` answers."""

    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, place: str, handler: Any, engine: Engine, source: Source) -> None:
        self.source = source
        host, _, port = place.rpartition(":")
        self.host = host.removeprefix("[").removesuffix("]").lower()  # as the configuration names it
        self.address_family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        super().__init__((self.host, int(port)), handler, config=Config(limits=engine.limits))
        engine.add(self)
