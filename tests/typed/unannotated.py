"""Right programs without annotations. A type checker without strict rules may mark none of these lines."""

# pyright: basic

from functools import wraps

from reqtable import AsyncRequestHandler, StateRequestHandler, Transition, exactly, flushed, line, state


def logged(function):
    @wraps(function)
    def wrapper(self, item):
        return function(self, item)

    return wrapper


class Machine(StateRequestHandler):
    words = 0

    def start(self):
        self.send(b"hello")
        return self.command

    @state(line())
    def command(self, text):
        if text == b"body":
            return self.body, exactly(3)
        if text == b"annotated":
            return self.annotated
        self.words += len(text.split())
        return self.command

    @state()
    def body(self, text):
        return self.inferred, line()

    @state()
    def inferred(self, text: bytes):
        return self.above if text else None

    @logged
    @state(line())
    def above(self, text):
        return self.ended, flushed()

    @state(flushed())
    def ended(self, _):
        self.send(b"bye")

    @state(line())
    def annotated(self, text: bytes) -> Transition:
        match text:
            case b"body":
                return self.body, exactly(3)
            case b"inferred":
                return self.inferred, line()
            case b"logged":
                return self.above
            case b"ended":
                return self.ended
            case _:
                return self.command

    def on_eof(self, partial):
        return self.body, exactly(0)


class Derived(Machine):
    @state(line(512))
    def command(self, text):
        return super().command(text)


class Coroutine(AsyncRequestHandler):
    async def handle(self):
        text = await self.read(line())
        await self.send(text)
