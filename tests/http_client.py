"""What the tests of HTTP share: a client that reads one answer after the other, and a folder to serve."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from reqtable.http.files import FileRequestHandler
from tests.support import Client

LONG_AGO = 1_600_000_000
BIG = bytes(range(256)) * 4 * 1024  # 1 MiB


class Answer(NamedTuple):
    status: int
    fields: dict[str, str]
    body: bytes


class Asking(Client):
    """Sends requests on one connection, and reads their answers."""

    def get(self, path: str, method: str = "GET", **fields: str) -> Answer:
        """Send a request and return its answer. `if_range="x"` sends `If-Range: x`."""
        lines = [f"{method} {path} HTTP/1.1", "Host: x"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
        self.send("\r\n".join([*lines, "", ""]).encode("latin-1"))
        return self.answer(method)

    def answer(self, method: str = "GET") -> Answer:
        head = self.head()
        first, *lines = head.decode("latin-1").split("\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in lines if each)}
        status = int(first.split()[1])
        if method == "HEAD" or status in (204, 304):
            return Answer(status, fields, b"")
        if fields.get("transfer-encoding") != "chunked":
            return Answer(status, fields, self.receive(int(fields["content-length"])))
        body = bytearray()
        while size := int(self.line(), 16):
            body += self.receive(size)
            assert self.receive(2) == b"\r\n"
        assert self.receive(2) == b"\r\n"
        return Answer(status, fields, bytes(body))

    def head(self) -> bytes:
        """Read a head, and nothing of its body."""
        head = b""
        while line := self.line():
            head += line
            if line == b"\r\n":
                break
        return head


def get(server: Any, path: str, method: str = "GET", **fields: str) -> Answer:
    """Send one request on a connection of its own."""
    with Asking(server.server_address) as client:
        return client.get(path, method, **fields)


def folder_in(tmp_path: Path) -> Path:
    """Make a folder to serve, `root`, beside a file `secret`. Returns its path."""
    (tmp_path / "secret").write_text("secret")
    root = tmp_path / "root"
    (root / "sub" / "deep").mkdir(parents=True)
    (root / "page.html").write_text("<p>hello")
    (root / "big.bin").write_bytes(BIG)
    (root / "empty").write_text("")
    (root / "sub" / "index.html").write_text("the index")
    (root / "sub" / "deep" / "a.txt").write_text("0123456789")
    for each in root.rglob("*"):
        os.utime(each, (LONG_AGO, LONG_AGO))
    return root


def files_of(root: Path, **options: Any) -> type[FileRequestHandler]:
    return type("Files", (FileRequestHandler,), {"root": str(root), **options})
