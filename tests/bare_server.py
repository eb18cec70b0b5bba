"""A server in "an environment that supports neither threads nor fork()": run by test_bare.py in its own process.

`os.fork` is gone, starting a thread raises, and nothing but the standard library and reqtable can be imported. Serves
the handler named on the command line, prints its port, and stops after the number of connections given.
"""

import importlib.abc
import os
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).parent.parent


class Refuse(importlib.abc.MetaPathFinder):
    """Only the standard library, reqtable and the examples."""

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top in ("reqtable", "echo"):
            return None
        raise ImportError(f"{name} is blocked")


def refuse_thread(*args, **kwargs):
    raise RuntimeError("can't start new thread")


def main(handler_name: str, connections: int) -> None:
    sys.meta_path.insert(0, Refuse())
    for blocked in ("greenlet", "click"):
        sys.modules.pop(blocked, None)
    del os.fork
    threading.Thread.start = refuse_thread
    import _thread

    _thread.start_new_thread = refuse_thread
    sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

    import echo

    import reqtable

    class Server(reqtable.TableTCPServer):
        def service_actions(self):
            if self.table.last_id >= connections and not len(self.table):
                self.shutdown()

    with Server(("127.0.0.1", 0), getattr(echo, handler_name)) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()
    foreign = {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
    print(sorted(foreign - {"reqtable", "echo", "__main__", "__mp_main__"}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
