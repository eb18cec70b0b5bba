"""A handler whose step gets SIGTERM: test_drain.py serves it."""

import os
import signal

from reqtable.http import HTTPRequestHandler


class Signalled(HTTPRequestHandler):
    def do_GET(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return self.answer(200)
