"""The server that `tests.faults` does its worst to, in a process of its own; its options are JSON on the command line.

Prints its port. Commands, a line each: `big N` is answered with N bytes, `stats` with what was counted, as a line of
JSON; any other line is sent back. SIGTERM drains it.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import threading
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent.parent)]

import reqtable  # noqa: E402
from reqtable import Config, Limits, flushed, line, nothing, state  # noqa: E402

PIECE = bytes(32_768)


class States(reqtable.StateRequestHandler):
    """Waits for the kernel to take each piece."""

    left: int = 0
    pause = flushed()

    @state(line())
    def command(self, text: bytes) -> Any:
        if text.startswith(b"big "):
            self.left = int(text[4:])
            return self.more, self.pause
        self.send(answer(self.server, text))
        return self.command

    @state()
    def more(self, _: None) -> Any:
        if self.left <= 0:
            return self.command
        self.send(PIECE[: self.left])
        self.left -= len(PIECE)
        return self.more, self.pause


class Burst(States):
    """Waits for nothing: the high-water mark is all that holds it back."""

    pause = nothing()


class Coroutine(reqtable.AsyncRequestHandler):
    async def handle(self) -> None:
        while text := await self.read(line()):
            if text.startswith(b"big "):
                for left in range(int(text[4:]), 0, -len(PIECE)):
                    await self.send(PIECE[:left])
            else:
                await self.send(answer(self.server, text))


class Blocking(reqtable.StreamRequestHandler):
    def handle(self) -> None:
        for text in self.rfile:
            if text.startswith(b"big "):
                for left in range(int(text[4:]), 0, -len(PIECE)):
                    self.wfile.write(PIECE[:left])
            else:
                self.wfile.write(answer(self.server, text))


def answer(server: Any, text: bytes) -> bytes:
    if text != b"stats\n":
        return text
    sent = sum(entry.bytes_out for entry in server.table)
    counted = {"accept_calls": server.accept_calls, "held_max": server.held_max, "sent": sent}
    return json.dumps(counted | server.stats()).encode() + b"\n"


class Server(reqtable.TCPServer):
    accept_calls = 0
    held_max = 0  # output of one request, in memory

    def get_request(self) -> Any:
        self.accept_calls += 1
        return super().get_request()

    def sample(self) -> None:
        """Look at what the requests hold, every millisecond: here, or in the loop of the thread that has one."""
        for entry in self.table:
            driver = getattr(entry.transport, "driver", None)
            held = (entry if driver is None else driver.entry).output.held
            self.held_max = max(self.held_max, held)
        self.engine.loop.mailbox.call_later(self.sample, 0.001)


def main(options: dict[str, Any]) -> None:
    if "descriptors" in options:
        resource.setrlimit(resource.RLIMIT_NOFILE, (options["descriptors"], options["descriptors"]))
    handler = {"state": States, "burst": Burst, "async": Coroutine, "blocking": Blocking}[options["style"]]
    config = Config(limits=Limits(**options.get("limits", {})))
    with Server(("127.0.0.1", 0), handler, config=config, dispatch=options.get("dispatch", "greenlet")) as server:
        drain = threading.Thread(target=server.drain, args=(options.get("drain_s", 30),))
        signal.signal(signal.SIGTERM, lambda *_: drain.start())
        if options.get("samples"):
            server.engine.post(server.sample)
        print(server.server_address[1], flush=True)
        server.serve_forever()
        if drain.ident:
            drain.join()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
