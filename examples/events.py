"""Server-sent events: a page that shows what anybody sends. Ten thousand listeners need one thread.

    reqtable serve examples/events.py:Events --bind tcp://127.0.0.1:8000

Open http://127.0.0.1:8000/ in two windows, or:

    curl -N http://127.0.0.1:8000/events
    curl -d 'hello' http://127.0.0.1:8000/events

All requests share the listeners, so don't use `--dispatch fork`, nor `pool`: states would run in several threads.
"""

from typing import ClassVar

from reqtable import Arrived, Transition, disconnected, either, state, told
from reqtable.http import HTTPRequestHandler, encode_event, route

HEARTBEAT_S = 15
PAGE = """<!DOCTYPE html>
<title>Events</title>
<form onsubmit="fetch('/events', {method: 'POST', body: text.value}); text.value = ''; return false">
<input id="text" autofocus></form>
<ul id="seen"></ul>
<script>
new EventSource("/events").onmessage = (event) => {
  const line = document.createElement("li");
  line.textContent = event.data;
  document.getElementById("seen").append(line);
};
</script>
"""


class Events(HTTPRequestHandler):
    """Sends each text that is posted to all who listen."""

    listeners: ClassVar[set["Events"]] = set()
    count: ClassVar[list[int]] = [0]

    @route("GET", "/")
    def page(self) -> Transition:
        return self.answer(200, PAGE, content_type="text/html; charset=utf-8")

    @route("POST", "/events")
    def post(self) -> Transition:
        self.count[0] += 1
        event = encode_event(self.request.body.decode("utf-8", "replace"), id=str(self.count[0]))  # once for all
        taken = sum(listener.tell(event) for listener in self.listeners)
        return self.answer(200, f"sent to {taken}\n")

    @route("GET", "/events")
    def listen(self) -> Transition:
        self.begin_events()
        if self.request.method == "HEAD":
            return self.end_answer()
        self.send_event(retry=1000)
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
