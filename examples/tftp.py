"""A read-only TFTP server (RFC 1350). Each client has a session, with timeouts and resends of blocks.

    cd folder/to/serve; reqtable serve path/to/tftp.py:Tftp --bind udp://127.0.0.1:6969
    curl tftp://127.0.0.1:6969/file

Every answer comes from the server's own port, and the client's address identifies the session. (RFC 1350 has servers
answer from a new port; clients accept the old port as well.)
"""

import struct
from pathlib import Path
from typing import ClassVar

from reqtable import StateRequestHandler, Transition, datagram, state

READ, WRITE, DATA, ACK, ERROR = 1, 2, 3, 4, 5
NOT_FOUND, DENIED, ILLEGAL = 1, 2, 4
BLOCK_BYTES = 512


class Tftp(StateRequestHandler):
    """Sends one file to one client."""

    root: ClassVar[Path] = Path(".")
    resends_max: ClassVar[int] = 5

    path: str = ""
    size: int = 0
    block: int = 0  # the block that was sent last; 1 is the first block
    resends: int = 0

    @state(datagram(), timeout=5)
    def request(self, packet: bytes) -> Transition:
        """Read the first datagram, which names the file."""
        opcode, names = packet[:2], packet[2:].split(b"\0")
        if opcode == struct.pack("!H", WRITE):
            return self.fail(DENIED, "this server is read-only")
        if opcode != struct.pack("!H", READ):
            return self.fail(ILLEGAL, "a transfer begins with a read request")
        if len(names) < 3 or names[1].lower() not in (b"octet", b"netascii"):
            return self.fail(ILLEGAL, "a read request is a name and a mode")
        root = self.root.resolve()
        path = (root / names[0].decode("utf-8", "replace").lstrip("/")).resolve()
        if not path.is_relative_to(root) or not path.is_file():
            return self.fail(NOT_FOUND, "there is no such file")
        self.path, self.size = str(path), path.stat().st_size
        return self.send_block(1)

    @state(datagram(), timeout=1.0)
    def acknowledged(self, packet: bytes) -> Transition:
        """Read an acknowledgement, which may be stale."""
        if packet[:2] == struct.pack("!H", ERROR):
            return None
        if packet[:4] != struct.pack("!HH", ACK, self.block & 0xFFFF):
            return self.acknowledged  # an answer to a duplicate would double every later block
        if self.block * BLOCK_BYTES > self.size:
            return None  # the last block was short, which ends a transfer
        return self.send_block(self.block + 1)

    def on_timeout(self) -> Transition:
        self.resends += 1
        if self.resends > self.resends_max or not self.block:
            return None
        return self.send_block(self.block)

    def send_block(self, block: int) -> Transition:
        if block != self.block:
            self.block, self.resends = block, 0
        with open(self.path, "rb") as file:  # no descriptor is held between blocks
            file.seek((block - 1) * BLOCK_BYTES)
            data = file.read(BLOCK_BYTES)
        self.send(struct.pack("!HH", DATA, block & 0xFFFF) + data)
        return self.acknowledged

    def fail(self, code: int, message: str) -> Transition:
        self.send(struct.pack("!HH", ERROR, code) + message.encode() + b"\0")
        return None
