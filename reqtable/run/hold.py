"""`Hold`: when an engine accepts requests that takes the place of another process, or of a worker of it."""

from __future__ import annotations

from collections.abc import Callable

from reqtable.handover.taker import stop_listening
from reqtable.server.engine import Engine
from reqtable.table.states import State

_LOOK_S = 0.05  # how often an engine that is not needed looks whether it has requests


class Hold:
    """Keeps `engine` from accepting until `listen`. `on_listening` is called then."""

    def __init__(self, engine: Engine, on_listening: Callable[[], object] = bool) -> None:
        self._engine = engine
        self._on_listening = on_listening
        self._is_leaving = False
        engine.serving.is_held = True

    def listen(self) -> None:
        """Accept from now on, unless the engine does, or is not needed."""
        if self._engine.serving.is_held and not self._is_leaving:
            self._engine.serving.listen()
            self._on_listening()

    def leave(self) -> None:
        """Accept nothing more, and stop the engine with its last request: it is not needed."""
        if not self._is_leaving:
            self._is_leaving = True
            stop_listening(self._engine)
            self._stop_when_empty()

    def _stop_when_empty(self) -> None:
        if any(each.state is not State.CLOSED for each in self._engine.table):
            self._engine.call_later(_LOOK_S, self._stop_when_empty)
        else:
            self._engine.stop()
