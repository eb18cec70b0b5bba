"""Runs waitress's own functional tests with reqtable in place of waitress: `python waitress_shim.py FOLDER`.

FOLDER has an unpacked source release of waitress. This is a program, not a module: the tests of that release are a
package `tests` too. It prints a line of JSON: how many tests ran, and the last line of the report of each that failed.

The shim changes three things: the server that a test starts; the requests, which get a Host (RFC 9112, 3.2: without one
they are invalid); the expected texts in `OURS`.
"""

from __future__ import annotations

import io
import ipaddress
import json
import logging
import os
import re
import socket
import sys
import tempfile
import unittest
from typing import Any

FOLDER = sys.argv[1]
sys.path[0] = FOLDER

import reqtable  # noqa: E402
from reqtable.http import wsgi_handler  # noqa: E402
from tests import test_functional as theirs  # noqa: E402

WAIT_S = 2.0  # in place of for ever: where waitress closes a connection and reqtable keeps it

OURS = {
    "HTTP/1.0": "HTTP/1.1",  # an answer has the server's version, not the client's (RFC 9110, 6.2)
    "Keep-Alive": "keep-alive",  # the option has no case (RFC 9110, 7.6.1)
    b"Invalid chunk size": b"the size of a chunk is not a hexadecimal number",
    b"Invalid chunk extension": b"the extension of a chunk is not well-formed",
    b"Chunk not properly terminated": b"a chunk is longer than its size",
}
SETTINGS = {"max_request_header_size": "head_bytes_max", "max_request_body_size": "body_bytes_max"}


def start_server(app: Any, fixture: Any, queue: Any, **settings: Any) -> None:
    """Serve an application, as the test asks, and put the address into the queue."""

    def application(environ: Any, start_response: Any) -> Any:
        environ["REMOTE_HOST"] = environ["REMOTE_ADDR"]  # a variable that only waitress sets
        return app(environ, start_response)

    logging.disable()
    ours: dict[str, Any] = {SETTINGS[name]: value for name, value in settings.items() if name in SETTINGS}
    if "trusted_proxy" in settings:
        ours |= {"trusted": (ipaddress.ip_network("127.0.0.0/8"),), "trusts_unix": True}
    handler = wsgi_handler(application, server_name="waitress", **ours)
    if fixture.family == socket.AF_UNIX:
        path = os.path.join(tempfile.gettempdir(), f"waitress-shim-{os.getpid()}.sock")
        server: Any = reqtable.UnixStreamServer(path, handler, dispatch="pool")
    else:
        server = reqtable.TCPServer(("127.0.0.1", 0), handler, dispatch="pool")
    queue.put(server.server_address)
    server.serve_forever()


class HostSocket(socket.socket):
    """Adds a Host to each request, and does not wait for ever."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.settimeout(WAIT_S)

    def send(self, data: Any, flags: int = 0) -> int:
        self.sendall(re.sub(rb"( HTTP/1\.1\r\n)", rb"\1Host: x\r\n", data))
        return len(data)


class Expectations:
    """Puts our text in the place of waitress's."""

    server: Any

    def create_socket(self) -> socket.socket:
        return HostSocket(self.server.family, socket.SOCK_STREAM)

    def assertEqual(self, first: Any, second: Any, *message: Any) -> None:  # noqa: N802
        expected = second.decode() if isinstance(second, bytes) and len(second) < 100 else second
        ours = OURS.get(expected, second) if isinstance(expected, str) else second
        if isinstance(second, bytes) and isinstance(ours, str):
            ours = ours.encode()
        super().assertEqual(first, ours, *message)  # noqa: PT009

    def assertIn(self, member: Any, *rest: Any) -> None:  # noqa: N802
        super().assertIn(OURS.get(member, member), *rest)  # noqa: PT009


def main() -> None:
    theirs.start_server = start_server
    loader = unittest.TestLoader()
    suite = unittest.TestSuite()
    for name, each in vars(theirs).items():
        if isinstance(each, type) and issubclass(each, unittest.TestCase):
            suite.addTests(loader.loadTestsFromTestCase(type(name, (Expectations, each), {})))
    result = unittest.TextTestRunner(io.StringIO()).run(suite)
    failed = {
        test.id().rpartition("__main__.")[2]: text.strip().splitlines()[-1]
        for test, text in result.failures + result.errors
    }
    print(json.dumps({"ran": result.testsRun, "failed": failed}))


if __name__ == "__main__":
    main()
