"""Sends the same bytes to reqtable and to others, and shows what two of them split differently (request smuggling).

    python -m tests.http_suites            gunicorn, waitress and uvicorn, as far as they are installed
    NGINX=/usr/sbin/nginx HAPROXY=... python -m tests.http_suites    also these, in front of reqtable

A difference between two servers that both answer is listed. For a proxy in front, it is a failure if reqtable has
served other requests than its client has got answers to: those are smuggled. HEAD is left out: its answers are empty.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from reqtable.http import HTTPRequestHandler
from tests.http_suites import corpus
from tests.support import served

GET = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /a HTTP/1.1\r\nHost: x\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
OURS = [
    POST + b"Content-Length: %d\r\n" % (5 + len(GET)) + CHUNKED + b"\r\n0\r\n\r\n" + GET,
    POST + CHUNKED + b"Content-Length: 4\r\n\r\n0\r\n\r\n" + GET,
    *[
        POST + field + b"Content-Length: 5\r\n\r\n0\r\n\r\n" + GET
        for field in (
            b"Transfer-Encoding : chunked\r\n",
            b"Transfer-Encoding:\x0bchunked\r\n",
            b"Transfer-Encoding: xchunked\r\n",
            b"Transfer-Encoding: chunked, identity\r\n",
            b"Transfer-Encoding:\r\n chunked\r\n",
            b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n",
            b"X: y\nTransfer-Encoding: chunked\r\n",
            b"Transfer_Encoding: chunked\r\n",
            b"X: y\rTransfer-Encoding: chunked\r\n",
            b"\0Transfer-Encoding: chunked\r\n",
        )
    ],
    *[
        POST + field + b"\r\n" + GET
        for field in (
            b"Content-Length: 0\r\nContent-Length: %d\r\n" % len(GET),
            b"Content-Length: 0, %d\r\n" % len(GET),
            b"Content-Length: +%d\r\n" % len(GET),
            b"Content-Length: 0x1\r\n",
            b"Content-Length: 1_0\r\n",
            b"Content-Length: %d \r\n" % len(GET),
            b"Content-Length:\r\n",
            b"Content-Length: -1\r\n",
            b"Expect: 100-continue\r\nContent-Length: %d\r\n" % len(GET),
        )
    ],
    *[
        POST + CHUNKED + b"\r\n" + body + GET
        for body in (
            b"0\n\n",
            b"0\r\n\r",
            b"3\r\nabcXX0\r\n\r\n",
            b"3\nabc\r\n0\r\n\r\n",
            b"0x3\r\nabc\r\n0\r\n\r\n",
            b"+3\r\nabc\r\n0\r\n\r\n",
            b"3 \r\nabc\r\n0\r\n\r\n",
            b"3;a\nb\r\nabc\r\n0\r\n\r\n",
            b"3;\r\nabc\r\n0\r\n\r\n",
            b"10000000000000003\r\nabc\r\n0\r\n\r\n",
            b"3\r\nabcd\r\n0\r\n\r\n",
            b"0\r\nContent-Length: 5\r\n\r\n",
            b"0;\xff\r\n\r\n",
        )
    ],
    b"GET http://y/a HTTP/1.1\r\nHost: x\r\n\r\n" + GET,
    b"GET /a HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n" + GET,
    b"GET /a HTTP/1.1\r\nHost: x\r\n\n" + GET,
    b"GET /a HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + GET,
    b"GET /a HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc" + GET,
    b"GET /a HTTP/1.1 \r\nHost: x\r\n\r\n" + GET,
    b"GET  /a HTTP/1.1\r\nHost: x\r\n\r\n" + GET,
    b"GET\t/a\tHTTP/1.1\r\nHost: x\r\n\r\n" + GET,
]

Split = tuple[str, ...]


class Answers(HTTPRequestHandler):
    served: list[str]

    def respond(self) -> Any:
        request = self.request
        text = f"<{request.method} {unquote(request.path)} {len(request.body)}>"
        SERVED.append(text)
        return self.answer(200, text.encode("latin-1", "replace"), content_type="text/plain")


SERVED: list[str] = []


def split_by(port: int, data: bytes) -> tuple[Split, bool]:
    """Send `data`. Returns the requests that were answered with 200, and whether anything was refused."""
    came = b""
    with socket.create_connection(("127.0.0.1", port), timeout=1) as client, contextlib.suppress(OSError):
        client.sendall(data)
        client.settimeout(0.4)  # a server that waits for more says nothing
        while more := client.recv(65_536):
            came += more
    found = tuple(each.decode("latin-1") for each in re.findall(rb"<[!-~]+ [^<>]* [0-9]+>", came))
    return found, bool(re.search(rb"HTTP/1\.[01] [45]\d\d", came))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], port: int, folder: Path) -> Iterator[int]:
    """Run a server during the block, once it accepts connections."""
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            if process.poll() is not None:
                break
            time.sleep(0.05)
        else:
            raise RuntimeError(f"{command[0]} does not listen: {(folder / 'log').read_text()[-2000:]}")
        yield port
    finally:
        process.terminate()
        process.wait(10)


def commands(backend: int, folder: Path) -> Iterator[tuple[str, list[str], int, bool]]:
    """Yield the name, the command and the port of each peer, and whether it is a proxy in front of `backend`."""
    python = [sys.executable, "-m"]
    for name, text in (
        ("gunicorn", "gunicorn -b 127.0.0.1:{} tests.http_suites.peers:wsgi -k gthread --threads 4"),
        ("waitress", "waitress --listen=127.0.0.1:{} tests.http_suites.peers:wsgi"),
        ("uvicorn", "uvicorn --port {} --http httptools --log-level critical tests.http_suites.peers:asgi"),
    ):
        port = free_port()
        if find_spec(name) is not None:
            yield name, python + text.format(port).split(), port, False
    port = free_port()
    if nginx := os.environ.get("NGINX") or shutil.which("nginx"):
        conf = folder / "nginx.conf"
        paths = "".join(f"{kind}_temp_path {folder};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        conf.write_text(
            f"daemon off; pid {folder}/pid; error_log {folder}/log; events {{}}\n"
            f"http {{ access_log off; {paths} upstream us {{ server 127.0.0.1:{backend}; keepalive 4; }}\n"
            f"server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://us; proxy_http_version 1.1;\n"
            'proxy_set_header Connection ""; proxy_request_buffering off; } } }\n'
        )
        yield "nginx", [nginx, "-p", str(folder), "-c", str(conf), "-e", str(folder / "log")], port, True
    port = free_port()
    if haproxy := os.environ.get("HAPROXY") or shutil.which("haproxy"):
        conf = folder / "haproxy.cfg"
        conf.write_text(
            "defaults\n mode http\n timeout client 5s\n timeout server 5s\n timeout connect 5s\n http-reuse always\n"
            f"listen us\n bind 127.0.0.1:{port}\n server us 127.0.0.1:{backend}\n"
        )
        yield "haproxy", [haproxy, "-db", "-f", str(conf)], port, True


def inputs() -> list[tuple[str, bytes]]:
    found = [(f"ours {number}", data) for number, data in enumerate(OURS)]
    if corpus.path() is not None:
        found += [(case.source, case.with_host()) for case in corpus.cases() if b"HEAD " not in case.data]
    return found


def compare(name: str, port: int, is_proxy: bool, ours: dict[str, tuple[Split, bool]]) -> list[str]:
    """Send all inputs to a peer. Returns the differences that matter."""
    refused = different = 0
    found = []
    for source, data in inputs():
        SERVED.clear()
        theirs, is_refused = split_by(port, data)
        refused += is_refused
        if is_proxy and list(theirs) != SERVED:
            found.append(f"smuggled through {name}: {source}: {data[:300]!r}: answered {theirs}, served {SERVED}")
        if not is_proxy and theirs != ours[source][0]:
            different += 1
            if len(ours[source][0]) > len(theirs) or not ours[source][1]:
                found.append(f"{name} splits {theirs}, reqtable {ours[source]}: {source}: {data[:300]!r}")
    print(f"{name}: {refused} of {len(inputs())} refused; {different} split differently")
    return found


def main() -> int:
    with tempfile.TemporaryDirectory() as made, served(Answers) as server:
        folder = Path(made)
        folder.chmod(0o777)  # nginx's worker has another user
        port = server.server_address[1]
        ours = {source: split_by(port, data) for source, data in inputs()}
        print(f"reqtable: {sum(is_refused for _, is_refused in ours.values())} of {len(ours)} refused")
        problems = []
        for name, command, own, is_proxy in commands(port, folder):
            with running(command, own, folder):
                found = compare(name, own, is_proxy, ours)
            print(*[f"  {each}" for each in found], sep="\n")
            problems += [each for each in found if is_proxy]
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
