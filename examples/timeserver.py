"""Tells the time over a Unix datagram socket. Each datagram gets one answer.

reqtable serve examples/timeserver.py:Time --bind unixgram:///tmp/time.sock
echo "%H:%M" | socat -t1 - unix-sendto:/tmp/time.sock,bind=/tmp/asker.sock
"""

import time

from reqtable import DatagramRequestHandler


class Time(DatagramRequestHandler):
    """Formats the time. The datagram is a format for strftime(3); if it is empty, the answer is seconds since 1970."""

    def handle(self) -> None:
        form = self.rfile.readline(256).strip().decode("ascii", "replace")
        answer = time.strftime(form, time.gmtime()) if form else f"{time.time():.0f}"
        self.wfile.write(answer.encode("ascii", "replace") + b"\n")
