"""A handler that tells of the process that serves it, for tests of processes: a line is asked, a line is answered."""

from __future__ import annotations

import os
import signal
import time

from reqtable import StateRequestHandler, StreamRequestHandler, Transition, exactly, line, sleep, state


class Teller(StateRequestHandler):
    @state(line(limit=512))
    def asked(self, text: bytes) -> Transition:
        verb, _, rest = text.decode().strip().partition(" ")
        if verb == "pid":
            self.say(os.getpid())
        elif verb == "env":
            self.say(os.environ.get(rest, "-"))
        elif verb == "handler":
            self.say(signal.getsignal(int(rest)))
        elif verb == "inheritable":
            self.say(os.get_inheritable(int(rest)))
        elif verb == "echo":
            self.say(f"{os.getpid()} {rest}")
        elif verb == "slowly":
            return self.awake, sleep(float(rest))
        elif verb == "take":
            self.say(os.getpid())
            return self.taken, exactly(int(rest))
        elif verb == "block":  # the loop, and so everyone
            time.sleep(float(rest))
        elif verb == "exit":
            os._exit(int(rest))
        return self.asked

    @state()
    def awake(self, _: None) -> Transition:
        self.say(os.getpid())
        return self.asked

    @state()
    def taken(self, data: bytes) -> Transition:
        self.say(len(data))
        return self.asked

    def say(self, what: object) -> None:
        self.send(f"{what}\n".encode())


class Blocking(StreamRequestHandler):
    """Some of the same."""

    def handle(self) -> None:
        for text in self.rfile:
            verb, _, rest = text.decode().strip().partition(" ")
            if verb == "slowly":
                time.sleep(float(rest))
            self.wfile.write(f"{os.getpid()} {rest}\n".encode() if verb == "echo" else b"%d\n" % os.getpid())
