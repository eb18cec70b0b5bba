"""`slowhttptest` with slow heads, slow bodies and slow readers at once, and honest clients beside them."""

from __future__ import annotations

import re
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.http_suites.suite import Failed, Reqtable, output_of, program
from tests.support import Client

_HONEST = 4
_LATEST_S = 1.0  # an honest client must have its answer by then
_CONNECTIONS = 200
_ATTACKS = {
    "heads": "-H -i 2",
    "bodies": "-B -i 2",
    "readers": "-X -w 10 -y 20 -n 2 -z 5 -k 3",
}


def run(quick: bool) -> str:
    path = program("slowhttptest", "slowhttptest")
    done = threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "index.html").write_bytes(b"hello\n")
        (Path(folder) / "large.bin").write_bytes(bytes(4 * 2**20))
        with Reqtable("http", folder) as server, ThreadPoolExecutor(_HONEST + len(_ATTACKS)) as pool:
            try:
                honest = [pool.submit(_ask, server.port, done) for _ in range(_HONEST)]
                common = f"-c {_CONNECTIONS} -r 100 -l 12 -p 3 -u http://{server.address}/large.bin"
                attacks = {
                    name: pool.submit(output_of, [path, *f"{own} {common}".split()]) for name, own in _ATTACKS.items()
                }
                for name, attack in attacks.items():
                    _check(name, attack.result()[1])
            finally:
                done.set()
            waited = [each for client in honest for each in client.result()]
    if max(waited) > _LATEST_S:
        raise Failed(f"an honest client has waited {max(waited):.2f} s")
    return (
        f"available beside {len(_ATTACKS)} x {_CONNECTIONS} slow {', '.join(_ATTACKS)}; "
        f"{len(waited)} honest requests, the slowest {max(waited) * 1000:.0f} ms"
    )


def _ask(port: int, done: threading.Event) -> list[float]:
    """Ask again and again, each time by a new connection. Returns how long each answer took, in seconds."""
    waited = []
    while not done.is_set():
        began = time.monotonic()
        with Client(("127.0.0.1", port)) as client:
            came = client.send(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").rest()
        if not came.endswith(b"\r\n\r\nhello\n"):
            raise Failed(f"an honest client was answered {came[:200]!r}")
        waited.append(time.monotonic() - began)
        done.wait(0.01)
    return waited


def _check(name: str, printed: str) -> None:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", printed)
    found = re.findall(r"service available: +(\w+)", plain)
    if not found or set(found) != {"YES"}:
        raise Failed(f"slow {name}: available {found}:\n{plain[-2000:]}")
