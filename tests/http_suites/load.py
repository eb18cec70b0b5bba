"""`ab`, `wrk` and `h2load` against `reqtable http` and `reqtable wsgi`: all requests are answered, and in the log."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from tests.http_suites.suite import Failed, Reqtable, number_in, output_of, program

_REQUESTS, _CLIENTS = 4000, 32


def _ab(printed: str) -> int:
    if failed := number_in(printed, r"Failed requests: +(\d+)"):
        raise Failed(f"ab: {failed} failed requests:\n{printed[-2000:]}")
    if "Non-2xx" in printed:
        raise Failed(f"ab: other answers than 2xx:\n{printed[-2000:]}")
    return number_in(printed, r"Complete requests: +(\d+)")


def _wrk(printed: str) -> int:
    if "Socket errors" in printed or "Non-2xx" in printed:
        raise Failed(f"wrk:\n{printed[-2000:]}")
    return number_in(printed, r"(\d+) requests in")


def _h2load(printed: str) -> int:
    if re.search(r" 0 failed, 0 errored, 0 timeout", printed) is None:
        raise Failed(f"h2load:\n{printed[-2000:]}")
    return number_in(printed, r"status codes: (\d+) 2xx, 0 3xx, 0 4xx, 0 5xx")


_PROGRAMS = (
    ("ab", "apache2-utils", f"-q -k -n {_REQUESTS} -c {_CLIENTS}", _ab),
    ("wrk", "wrk", f"-t 2 -c {_CLIENTS} -d 2s", _wrk),
    ("h2load", "nghttp2-client", f"--h1 -n {_REQUESTS} -c {_CLIENTS}", _h2load),
)


def run(quick: bool) -> str:
    paths = {name: program(name, package) for name, package, _, _ in _PROGRAMS}
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "index.html").write_bytes(b"x" * 2000)
        for command in (("http", folder), ("wsgi", "tests.http_suites.peers:wsgi")):
            for name, _, options, count in _PROGRAMS:
                with Reqtable(*command, "--access-log") as server:
                    _, printed = output_of([paths[name], *options.split(), f"http://{server.address}/"])
                    answers = count(printed)
                    _check(name, answers, server.log().count('"GET / HTTP/1.'))
                    figures.append(f"{command[0]} {name} {answers}")
    return f"no request failed, all are in the access log: {', '.join(figures)}"


def _check(name: str, answers: int, logged: int) -> None:
    """Compare the answers that a program has counted with those that the server has logged."""
    # wrk ends while each of its clients waits for an answer.
    most = answers + (_CLIENTS if name == "wrk" else 0)
    if not answers <= logged <= most or (name != "wrk" and answers != _REQUESTS):
        raise Failed(f"{name} counts {answers} answers, the server {logged}")
