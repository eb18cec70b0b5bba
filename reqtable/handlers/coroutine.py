"""`AsyncRequestHandler`: the same wants, awaited.

It is driven by the table's loop. There is no asyncio inside: what is awaited is a want, and a coroutine of the
handler's own that awaits wants.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from reqtable.core.compiled import mypyc_attr
from reqtable.core.errors import IncompleteRead, InvalidTransition
from reqtable.core.table import Entry
from reqtable.core.wants import NOTHING, Want, call, flushed, hand_off, sleep
from reqtable.handlers.resumable import ResumableHandler

T = TypeVar("T")


class _Done:
    """An awaitable that is done already: awaiting it costs no step."""

    __slots__ = ()

    def __await__(self) -> Any:
        return iter(())


_DONE = _Done()


@mypyc_attr(allow_interpreted_subclasses=True)
class AsyncRequestHandler(ResumableHandler):
    """A resumable handler written as a coroutine: redefine `handle`."""

    def __init__(self, entry: Entry) -> None:
        super().__init__(entry)
        self._coroutine: Coroutine[Want[Any], Any, None] = self.handle()
        self._waits: Want[Any] = NOTHING

    async def handle(self) -> None:
        """Serve the request; when it returns, what was sent is flushed, then the connection is closed."""
        raise NotImplementedError(f"{type(self).__name__} must define async def handle(self)")

    def read(self, want: Want[T], timeout: float | None = None) -> Awaitable[T]:
        """What `want` asks for. `timeout` is in seconds; None: as the server allows.

        At the peer's end of file `line`, `chunk` and `rest` give what is left, b"" in the end; `exactly` and `until`
        raise IncompleteRead, which carries it. Raises TimeoutError and LimitExceeded.
        """
        self.entry.timeout = timeout
        return want

    def send(self, data: bytes | bytearray | memoryview) -> Awaitable[None]:
        """Queue output. Awaiting suspends only while more than the high-water mark waits for the peer to take it."""
        self._send(data)
        entry = self.entry
        table = entry.table
        step = table.elsewhere.get(entry) if table.elsewhere else None
        held = entry.output.held if step is None else step.output.held
        return _DONE if held <= table.limits.high_water_bytes else flushed()

    def sleep(self, seconds: float) -> Awaitable[None]:
        """Let `seconds` pass; the others go on."""
        return sleep(seconds)

    def call(self, fn: Callable[..., T], *args: Any, on: str | None = None, **kwargs: Any) -> Awaitable[T]:
        """`fn(*args, **kwargs)`, run elsewhere; what it raises is raised here."""
        return call(fn, *args, on=on, **kwargs)

    def hand_off(self, policy: str) -> Awaitable[None]:
        """Go on under `policy`: `"thread"`, `"pool"` or `"fork"`."""
        return hand_off(policy)

    # -- for the engine -----------------------------------------------------------------------------------------------

    def _resume(self, item: Any) -> Want[Any] | None:
        self.entry.timeout = None  # each read names its own
        try:
            want = self._waits = self._coroutine.send(item)
        except StopIteration:
            return None
        return want if isinstance(want, Want) else self._refuse(want)

    def _throw(self, error: BaseException) -> Want[Any] | None:
        if isinstance(error, IncompleteRead) and self._waits.takes_partial:
            return self._resume(error.partial)
        self.entry.timeout = None
        try:
            want = self._waits = self._coroutine.throw(error)
        except StopIteration:
            return None
        return want if isinstance(want, Want) else self._refuse(want)

    def _close(self) -> None:
        try:
            self._coroutine.close()
        finally:
            self.on_close()

    def _leave(self) -> None:
        with contextlib.suppress(Exception):  # it is the child's, and this a copy
            self._coroutine.close()

    def _refuse(self, awaited: object) -> Want[Any] | None:
        """Whatever was awaited, the handler is told where it did it."""
        self._waits = NOTHING
        return self._throw(
            InvalidTransition(
                f"{type(self).__name__}.handle awaited {awaited!r}, which is not a want: await self.read(…), "
                "self.send(…), self.sleep(…) or self.call(…); there is no asyncio inside"
            )
        )
