"""An environment without threads and `fork()`, which the notes in `socketserver` mention."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import WAIT_S, Client, Started


@pytest.mark.parametrize("handler", ["StateEcho", "AsyncEcho"])
def test_serves_without_threads_fork_or_packages(handler: str) -> None:
    script = Path(__file__).with_name("bare_server.py")
    command = [sys.executable, "-S", "-I", str(script), handler, "20"]
    with Started(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        clients = [Client(("127.0.0.1", port)) for _ in range(20)]
        for number, client in enumerate(clients):
            client.send(b"half of line %d" % number)
        for number, client in enumerate(reversed(clients)):
            client.send(b", and the rest %d\n" % number)
        for number, client in enumerate(clients):
            with client:
                assert client.line() == b"half of line %d, and the rest %d\n" % (number, 19 - number)
        foreign, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0
    assert foreign == "[]\n"


WITHOUT = """
import sys
sys.modules[sys.argv[1]] = None  # importing it raises ImportError
import reqtable
class Idle(reqtable.AsyncRequestHandler):
    async def handle(self):
        pass
reqtable.TableTCPServer(("127.0.0.1", 0), Idle).server_close()
options = {"config": reqtable.Config(tls=reqtable.config.TLSOptions(cert="any.pem"))} if sys.argv[1] == "ssl" else {}
try:
    reqtable.TableTCPServer(("127.0.0.1", 0), reqtable.StreamRequestHandler, **options)
except reqtable.ConfigurationError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("ssl", "tls.cert: this Python has no module ssl: install a Python with ssl, or leave tls.cert out\n"),
        (
            "greenlet",
            "dispatch policy 'greenlet' needs the package greenlet for a blocking handler: pip install greenlet\n",
        ),
    ],
)
def test_a_missing_module_is_missed_only_where_it_is_needed(module: str, says: str) -> None:
    ran = subprocess.run([sys.executable, "-c", WITHOUT, module], capture_output=True, text=True, timeout=WAIT_S)
    assert (ran.stdout, ran.stderr) == (says, "")
