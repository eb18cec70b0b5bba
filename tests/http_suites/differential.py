"""Sends the same bytes to reqtable and to others, and shows what two of them split differently (request smuggling).

gunicorn, waitress and uvicorn stand beside reqtable, as far as they are installed: a difference is listed. nginx and
HAProxy stand in front of it: it is a failure if reqtable has served other requests than its client has got answers to,
because those are smuggled. NGINX=PATH and HAPROXY=PATH name other builds. HEAD is left out: its answers are empty.
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from urllib.parse import unquote

from reqtable.http import HTTPRequestHandler
from tests.http_suites import corpus
from tests.http_suites.suite import WAIT_S, Failed, Skipped
from tests.support import served

LANES = 16  # inputs that are sent at the same time
SETTLE_S = 0.4  # a server that waits for more says nothing

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

Requests = tuple[str, ...]


class Split(NamedTuple):
    """Holds how a server has split an input: the requests that it answered with 200, and whether it refused any."""

    answered: Requests
    is_refused: bool
    served: Requests  # by the reqtable behind a proxy


class Answers(HTTPRequestHandler):
    """Answers with what it was asked for, and notes that."""

    served: ClassVar[list[str]]

    def respond(self) -> Any:
        request = self.request
        text = f"<{request.method} {unquote(request.path)} {len(request.body)}>"
        self.served.append(text)
        return self.answer(200, text.encode("latin-1", "replace"), content_type="text/plain")


class Lane(NamedTuple):
    """Holds where a share of the inputs goes, and what the reqtable there has served."""

    address: Any  # of TCP, or the path of a Unix socket: others choose no free port, and ours could be taken
    served: list[str]

    def connect(self) -> socket.socket:
        if isinstance(self.address, tuple):
            return socket.create_connection(self.address, WAIT_S)
        client = socket.socket(socket.AF_UNIX)
        try:
            client.settimeout(WAIT_S)
            client.connect(str(self.address))
        except OSError:
            client.close()
            raise
        return client

    def split(self, data: bytes, settle_s: float) -> Split:
        """Send an input, and wait for what comes of it."""
        self.served.clear()
        came = b""
        with self.connect() as client, contextlib.suppress(OSError):
            client.sendall(data)
            client.settimeout(settle_s)
            while more := client.recv(65_536):
                came += more
        found = tuple(each.decode("latin-1") for each in re.findall(rb"<[!-~]+ [^<>]* [0-9]+>", came))
        return Split(found, bool(re.search(rb"HTTP/1\.[01] [45]\d\d", came)), tuple(self.served))

    def split_all(self, share: list[tuple[str, bytes]], is_proxy: bool) -> dict[str, Split]:
        found = {}
        for source, data in share:
            split = self.split(data, SETTLE_S)
            if is_proxy and split.answered != split.served:
                split = self.split(data, 8 * SETTLE_S)  # perhaps the answer was only late
            found[source] = split
        return found


def split_all(lanes: list[Lane], is_proxy: bool = False) -> dict[str, Split]:
    """Send all inputs, each lane its share, at the same time."""
    found: dict[str, Split] = {}
    data = inputs()
    with ThreadPoolExecutor(len(lanes)) as pool:
        shares = [pool.submit(lane.split_all, data[at :: len(lanes)], is_proxy) for at, lane in enumerate(lanes)]
        for share in shares:
            found |= share.result()
    return found


def inputs() -> list[tuple[str, bytes]]:
    found = [(f"ours {number}", data) for number, data in enumerate(OURS)]
    if corpus.path() is not None:
        found += [(case.source, case.with_host()) for case in corpus.cases() if b"HEAD " not in case.data]
    return found


@contextlib.contextmanager
def running(command: list[str], lanes: list[Lane], folder: Path) -> Iterator[None]:
    """Run a server during the block, once it accepts connections at all of its addresses."""
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        until = time.monotonic() + WAIT_S
        for lane in lanes:
            while not _accepts(lane):
                if process.poll() is not None or time.monotonic() > until:
                    raise Failed(f"{command[0]} does not listen: {(folder / 'log').read_text()[-2000:]}")
                time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(WAIT_S)


def _accepts(lane: Lane) -> bool:
    try:
        lane.connect().close()
    except OSError:
        return False
    return True


_NGINX = """daemon off; pid {folder}/pid; error_log {folder}/log; events {{}}
http {{ access_log off; {paths}
{servers} }}
"""
_NGINX_SERVER = """upstream to{backend} {{ server 127.0.0.1:{backend}; keepalive 4; }}
server {{ listen unix:{path}; location / {{ proxy_pass http://to{backend}; proxy_http_version 1.1;
proxy_set_header Connection ""; proxy_request_buffering off; }} }}
"""
_HAPROXY = """defaults
 mode http
 timeout client 5s
 timeout server 5s
 timeout connect 5s
 http-reuse always
"""
_HAPROXY_SERVER = """listen to{backend}
 bind unix@{path}
 server us 127.0.0.1:{backend}
"""


def proxies(backends: list[Lane], folder: Path) -> Iterator[tuple[str, list[str], list[Lane]]]:
    """Yield the name and the command of each proxy, and its lanes: it has a socket in front of each backend."""
    if nginx := os.environ.get("NGINX") or shutil.which("nginx") or shutil.which("/usr/sbin/nginx"):
        lanes, servers = _in_front("nginx", _NGINX_SERVER, backends, folder)
        paths = "".join(f"{kind}_temp_path {folder};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        conf = folder / "nginx.conf"
        conf.write_text(_NGINX.format(folder=folder, paths=paths, servers=servers))
        yield "nginx", [nginx, "-p", str(folder), "-c", str(conf), "-e", str(folder / "log")], lanes
    if haproxy := os.environ.get("HAPROXY") or shutil.which("haproxy") or shutil.which("/usr/sbin/haproxy"):
        lanes, servers = _in_front("haproxy", _HAPROXY_SERVER, backends, folder)
        conf = folder / "haproxy.cfg"
        conf.write_text(_HAPROXY + servers)
        yield "haproxy", [haproxy, "-db", "-f", str(conf)], lanes


def _in_front(name: str, text: str, backends: list[Lane], folder: Path) -> tuple[list[Lane], str]:
    """Return the lanes of a proxy, and the part of its configuration that makes them."""
    ports = [each.address[1] for each in backends]
    lanes = [Lane(folder / f"{name}{port}", each.served) for port, each in zip(ports, backends, strict=True)]
    return lanes, "".join(text.format(path=lane.address, backend=port) for lane, port in zip(lanes, ports, strict=True))


def peers(folder: Path) -> Iterator[tuple[str, list[str], list[Lane]]]:
    """Yield the name, the command and the lanes of each peer: all of them go to one socket."""
    for name, text in (
        ("gunicorn", "gunicorn -b unix:{} tests.http_suites.peers:wsgi -k gthread --threads 16"),
        ("waitress", "waitress --unix-socket={} tests.http_suites.peers:wsgi"),
        ("uvicorn", "uvicorn --uds {} --http httptools --log-level critical tests.http_suites.peers:asgi"),
    ):
        if find_spec(name) is not None:
            path = folder / name
            yield name, [sys.executable, "-m", *text.format(path).split()], [Lane(path, [])] * LANES


def run(quick: bool) -> str:
    figures, details, smuggled = [], [], []
    with tempfile.TemporaryDirectory() as made, ExitStack() as stack:
        folder = Path(made)
        folder.chmod(0o777)  # nginx's worker has another user
        backends = []
        for _ in range(LANES):
            notes: list[str] = []
            server = stack.enter_context(served(type("Answers", (Answers,), {"served": notes})))
            backends.append(Lane(server.server_address, notes))
        ours = split_all(backends)
        figures.append(f"of {len(ours)} inputs reqtable refuses {_refused(ours)}")
        in_front = [(*each, True) for each in proxies(backends, folder)]
        for name, command, lanes, is_proxy in [*[(*each, False) for each in peers(folder)], *in_front]:
            with running(command, lanes, folder):
                theirs = split_all(lanes, is_proxy)
            different = [each for each in ours if theirs[each].answered != ours[each].answered]
            found = [each for each, split in theirs.items() if is_proxy and split.answered != split.served]
            figures.append(f"{name} {_refused(theirs)}, {len(different)} split differently")
            if is_proxy:
                figures[-1] += f", {len(found)} smuggled"
            details += [
                f"{name}: {each}: {theirs[each].answered}, reqtable {ours[each].answered}"[:200]
                for each in different
                if not ours[each].is_refused
            ]
            smuggled += [
                f"{name}: {each}: answered {theirs[each].answered}, served {theirs[each].served}" for each in found
            ]
    if smuggled:
        raise Failed("\n".join(["; ".join(figures), *smuggled]))
    if not in_front:
        raise Skipped("nginx and haproxy are missing: apt-get install nginx-light haproxy")
    return "\n".join(["; ".join(figures), *details])


def _refused(found: dict[str, Split]) -> int:
    return sum(each.is_refused for each in found.values())
