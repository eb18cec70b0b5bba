"""Handlers that answer lines, and can get stuck: `stick` waits for what never comes, `hold` holds up the whole loop."""

from __future__ import annotations

import time

from reqtable import StateRequestHandler, StreamRequestHandler, Transition, line, sleep, state

LONG_S = 600.0


def hold_up() -> None:
    """Wait in the loop's own thread, where nothing but a signal gets through."""
    time.sleep(LONG_S)


class Lines(StateRequestHandler):
    count: int = 0

    @state(line(limit=4096))
    def asked(self, text: bytes) -> Transition:
        if text == b"stick\n":
            return self.stuck, sleep(LONG_S)
        if text == b"hold\n":
            hold_up()
        self.count += 1
        self.send(text)
        return self.asked

    @state()
    def stuck(self, _: None) -> Transition:
        return self.asked


class Blocking(StreamRequestHandler):
    def handle(self) -> None:
        for text in self.rfile:
            if text == b"stick\n":
                self.rfile.read(1)
            self.wfile.write(text)
