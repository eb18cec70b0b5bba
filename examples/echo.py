"""Echo lines, in each of the three styles. The same bytes whichever you serve:

reqtable serve examples/echo.py:StateEcho
reqtable serve examples/echo.py:AsyncEcho
reqtable serve examples/echo.py:BlockingEcho --dispatch greenlet
"""

from reqtable import AsyncRequestHandler, StateRequestHandler, StreamRequestHandler, Transition, line, state


class StateEcho(StateRequestHandler):
    """A state machine of one state."""

    @state(line(), timeout=60)
    def echo(self, text: bytes) -> Transition:
        self.send(text)
        return self.echo

    def on_eof(self, partial: bytes) -> Transition:
        self.send(partial)  # a last line without an end is echoed too
        return None


class AsyncEcho(AsyncRequestHandler):
    """The same, awaited."""

    async def handle(self) -> None:
        while text := await self.read(line(), timeout=60):
            await self.send(text)


class BlockingEcho(StreamRequestHandler):
    """The same, as `socketserver` has always had it."""

    timeout = 60

    def handle(self) -> None:
        for text in self.rfile:
            self.wfile.write(text)
