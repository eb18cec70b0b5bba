"""The servers of `servers` that show what crash takeover costs: one worker, with a journal and without it.

`same` echoes lines, and no field of its handler changes. `changing` changes two fields with each line.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any


def serve(make: Callable[[], Any], takeover: bool) -> None:
    import logging

    import reqtable

    logging.basicConfig(level=logging.ERROR)
    reqtable.serve(
        make(),
        "tcp://127.0.0.1:0",
        config=reqtable.Config(takeover=takeover),
        workers=1,
        on_listening=lambda names: print(names[0].rpartition(":")[2], flush=True),
    )


def same() -> Any:
    import reqtable

    class Same(reqtable.StateRequestHandler):
        name: str = "nobody"
        total: int = 0

        @reqtable.state(reqtable.line())
        def echo(self, text: bytes) -> Any:
            self.send(text)
            return self.echo

    return Same


def changing() -> Any:
    import reqtable

    class Changing(reqtable.StateRequestHandler):
        last: bytes = b""
        total: int = 0

        @reqtable.state(reqtable.line())
        def echo(self, text: bytes) -> Any:
            self.total += len(text) * 1000
            self.last = text
            self.send(text)
            return self.echo

    return Changing


PEERS = {
    name: {kind: partial(serve, make, has_journal) for kind, make in (("same", same), ("changing", changing))}
    for name, has_journal in (("reqtable-worker", False), ("reqtable-takeover", True))
}
