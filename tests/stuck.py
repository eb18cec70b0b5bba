"""A handler that holds up its worker when a client says so, until a file exists."""

from __future__ import annotations

import os
import time
from typing import Any

from reqtable import StateRequestHandler, line, state


class Stuck(StateRequestHandler):
    """Echoes lines; `stick PATH` blocks the loop until there is a file at PATH."""

    @state(line())
    def command(self, item: bytes) -> Any:
        words = item.split()
        if words[:1] == [b"stick"]:
            while not os.path.exists(words[1]):
                time.sleep(0.01)
        self.send(item)
        return self.command
