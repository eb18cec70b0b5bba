"""A server that counts what it leaves behind: run by test_policies.py in its own, small process.

Serves as many requests as are named, each a line that is sent back, under the policy that is named. Prints, as JSON,
what it holds before, when the first half has been served, and at the end.
"""

import gc
import json
import os
import sys
import threading
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent)]

import reqtable  # noqa: E402


class Quick(reqtable.StreamRequestHandler):
    def handle(self):
        self.wfile.write(self.rfile.readline())


def zombies() -> int:
    """The children of this process that have exited and nobody has waited for (proc(5))."""
    found = 0
    for each in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = each.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        found += state == "Z" and int(parent) == os.getpid()
    return found


def held() -> dict[str, int]:
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
    descriptors = len(os.listdir("/proc/self/fd"))
    return {"kib": resident, "descriptors": descriptors, "threads": threading.active_count(), "zombies": zombies()}


def main(dispatch: str, count: int) -> None:
    measured: list[dict[str, int]] = []

    def measure() -> None:
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not len(server.table):
                thread.join(5)  # the last steps of one that is done are not a leak
        measured.append(held())
        print(json.dumps(measured[-1]), flush=True)

    class Server(reqtable.TCPServer):
        request_queue_size = 128

        def service_actions(self):
            if len(self.table) == 0 and self.table.last_id == len(measured) * count // 2:
                measure()
                if len(measured) == 3:
                    self.shutdown()

    with Server(("127.0.0.1", 0), Quick, dispatch=dispatch) as server:
        server.engine.loop.open()
        print(server.server_address[1], flush=True)
        measure()
        server.serve_forever()
        print(json.dumps(sorted(getattr(server, "active_children", None) or ())), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
