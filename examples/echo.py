"""Echoes lines, in each of the three styles of handlers. All three send the same bytes:

reqtable serve examples/echo.py:StateEcho
reqtable serve examples/echo.py:AsyncEcho
reqtable serve examples/echo.py:BlockingEcho --dispatch greenlet
"""

from reqtable import AsyncRequestHandler, StateRequestHandler, StreamRequestHandler, Transition, line, state


class StateEcho(StateRequestHandler):
    """Echoes lines with a state machine that has one state."""

    @state(line(), timeout=60)
    def echo(self, text: bytes) -> Transition:
        self.send(text)
        return self.echo

    def on_eof(self, partial: bytes) -> Transition:
        self.send(partial)  # the last line may lack its line end
        return None


class AsyncEcho(AsyncRequestHandler):
    """Echoes lines with a coroutine."""

    async def handle(self) -> None:
        while text := await self.read(line(), timeout=60):
            await self.send(text)


class BlockingEcho(StreamRequestHandler):
    """Echoes lines with a blocking handler, as with `socketserver`."""

    timeout = 60

    def handle(self) -> None:
        for text in self.rfile:
            self.wfile.write(text)
