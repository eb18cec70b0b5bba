"""Hooks with another signature. A type checker with its rules of the box marks each line that says so."""

# pyright: standard

from reqtable import AsyncRequestHandler, StateRequestHandler, Transition, line, state
from reqtable.http import HTTPRequestHandler, WebSocketHandler


class Machine(StateRequestHandler):
    @state(line())
    def command(self, text: bytes) -> Transition:
        return None

    def start(self, item: bytes) -> Transition:  # error: start
        return None

    def on_eof(self) -> Transition:  # error: on_eof
        return None

    def on_timeout(self, error: Exception) -> Transition:  # error: on_timeout
        return None

    def on_limit(self, error: bytes) -> Transition:  # error: on_limit
        return None

    def on_error(self) -> Transition:  # error: on_error
        return None

    def on_close(self, error: Exception) -> None:  # error: on_close
        pass

    def send(self, data: str) -> None:  # error(mypy): send
        pass


class Derived(Machine):
    @state()
    def command(self, text: str) -> Transition:  # error: command
        return None


class Coroutine(AsyncRequestHandler):
    def handle(self) -> None:  # error: handle
        pass


class Site(HTTPRequestHandler):
    def on_head(self, head: bytes) -> Transition:  # error: on_head
        return None

    def on_body(self) -> Transition:  # error: on_body
        return None


class Echo(WebSocketHandler):
    def on_open(self, request: str) -> Transition:  # error: on_open
        return None

    def on_message(self, message: str) -> Transition:  # error: on_message
        return None
