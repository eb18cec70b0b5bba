"""Server-sent events: a page that shows what anybody sends. Ten thousand listeners need one thread.

    reqtable serve examples/events.py:Events --bind tcp://127.0.0.1:8000

Open http://127.0.0.1:8000/ in two windows, or:

    curl -N http://127.0.0.1:8000/events
    curl -d 'hello' http://127.0.0.1:8000/events

All requests share the listeners, so don't use `--dispatch fork`, nor `pool`: states would run in several threads.
"""

import time
from collections import deque
from typing import Any, ClassVar

from reqtable import Arrived, Transition, disconnected, either, state, told
from reqtable.http import HTTPRequestHandler, encode_event, route

HEARTBEAT_S = 15
RECENT_MAX = 100  # events that are kept for pages that were not connected for a while
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>Events</title>
<style>
  :root { color-scheme: light dark }
  body { font: 1rem/1.5 system-ui, sans-serif; max-width: 40rem; margin: 1rem auto; padding: 0 1rem }
  form { display: flex; gap: .5rem }
  input, button { font: inherit; padding: .5rem .75rem }
  input { flex: 1; min-width: 0 }
  ul { padding: 0; list-style: none; overflow-wrap: anywhere }
</style>
<h1>Events</h1>
<p id="status" role="status">connecting …</p>
<form id="form"><input id="text" aria-label="Your event" placeholder="Your event" autofocus required>
<button>Send</button></form>
<ul id="seen" role="log" aria-label="Events"></ul>
<script>
  const status = document.getElementById("status"), seen = document.getElementById("seen")
  const source = new EventSource("/events")  // connects again by itself, and then sends the last id
  source.onopen = () => status.textContent = "connected"
  source.onerror = () => status.textContent = "not connected, trying again …"
  source.onmessage = event => {
    const line = document.createElement("li")
    line.textContent = event.data  // always as text, never as HTML
    seen.prepend(line)
    if (seen.children.length > 500) seen.lastChild.remove()
  }
  document.getElementById("form").onsubmit = event => {
    event.preventDefault()
    const text = document.getElementById("text")
    fetch("/events", { method: "POST", body: text.value }).then(() => text.value = "")
  }
</script>
</html>
"""


class Events(HTTPRequestHandler):
    """Sends each text that is posted to all who listen."""

    listeners: ClassVar[set["Events"]] = set()
    recent: ClassVar[deque[tuple[int, bytes]]] = deque(maxlen=RECENT_MAX)  # the id of each event, and its bytes
    last: ClassVar[list[int]] = [time.time_ns() // 1_000_000]  # the last id; after a restart, the ids still grow

    @classmethod
    def save_state(cls, server: Any) -> dict[str, Any]:  # noqa: ARG003
        return {"listeners": [each.entry.id for each in cls.listeners], "recent": list(cls.recent), "last": cls.last}

    @classmethod
    def restore_state(cls, server: Any, data: dict[str, Any]) -> None:
        """Add the events, and the listeners that have moved: several old workers may give theirs to one new worker."""
        cls.listeners |= {entry.handler for id in data["listeners"] if (entry := server.table.get(id))}
        cls.recent = deque(sorted([*cls.recent, *data["recent"]]), maxlen=RECENT_MAX)
        cls.last[0] = max(cls.last[0], data["last"][0])

    @route("GET", "/")
    def page(self) -> Transition:
        return self.answer(200, PAGE, content_type="text/html; charset=utf-8")

    @route("POST", "/events")
    def post(self) -> Transition:
        self.last[0] += 1
        event = encode_event(self.request.body.decode("utf-8", "replace"), id=str(self.last[0]))  # once for all
        self.recent.append((self.last[0], event))
        taken = sum(listener.tell(event) for listener in self.listeners)
        return self.answer(200, f"sent to {taken}\n")

    @route("GET", "/events")
    def listen(self) -> Transition:
        self.begin_events()
        if self.request.method == "HEAD":
            return self.end_answer()
        self.send_event(retry=1000)
        seen = self.request.get("last-event-id") or ""
        if seen.isdecimal() and len(seen) < 20:  # the page connects again
            self.write(b"".join(event for id, event in self.recent if id > int(seen)))
        self.listeners.add(self)
        return self.listening

    @state(either(told(), disconnected()), timeout=HEARTBEAT_S)
    def listening(self, arrived: Arrived) -> Transition:
        if arrived.index == 1:
            return None
        self.write(arrived.item)
        return self.end_answer() if self.is_draining else self.listening

    def on_timeout(self) -> Transition:
        if self.state_name != "listening":
            return super().on_timeout()
        if self.is_draining:  # the page connects again, to the next process
            return self.end_answer()
        self.send_event()  # a comment: proxies end silent connections, and a client that has gone is noticed
        return self.listening

    def on_close(self) -> None:
        self.listeners.discard(self)
