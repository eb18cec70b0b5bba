"""`AsyncRequestHandler`: the same wants, awaited.

It is driven by the table's loop. There is no asyncio inside: what is awaited is a want, and a coroutine of the
handler's own that awaits wants.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Awaitable, Callable, Coroutine
from threading import get_ident
from typing import Any, TypeVar

from reqtable.handlers.discarded import Room, refuse_discarded
from reqtable.handlers.resumable import ResumableHandler
from reqtable.table.compiled import mypyc_attr
from reqtable.table.errors import HandlerError, IncompleteRead, InvalidTransition
from reqtable.table.places import functions_in, place_of
from reqtable.table.table import Entry
from reqtable.table.wants import NOTHING, Want, call, check_timeout, hand_off, sleep

T = TypeVar("T")

_AWAITED = ("read", "sleep", "call", "hand_off")  # what does nothing where nobody awaits it
_NO_LOOP = ("event loop", "async context", "create_future")  # what asyncio, trio and anyio say where they are not
_NO_ASYNCIO = (
    "there is no asyncio inside: an AsyncRequestHandler awaits self.read(…), self.send(…), self.sleep(…) or "
    "self.call(…), and what uses an event loop of its own runs in self.call(…)"
)


class _Done:
    """An awaitable that is done already: awaiting it costs no step."""

    __slots__ = ()

    def __await__(self) -> Any:
        return iter(())


_DONE = _Done()


@mypyc_attr(allow_interpreted_subclasses=True)
class AsyncRequestHandler(ResumableHandler):
    """A resumable handler written as a coroutine: redefine `handle`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raises HandlerError for a `handle` that is no coroutine, and for a want that nobody awaits."""
        super(AsyncRequestHandler, cls).__init_subclass__(**kwargs)  # noqa: UP008  # of a class method mypyc has it wrong
        functions = list(functions_in(cls.handle))
        if functions and not any(inspect.iscoroutinefunction(each) for each in functions):
            raise HandlerError(
                f"{cls.__name__}.handle is no coroutine: write async def handle(self), without a yield "
                f"({place_of(cls.handle)})"
            )
        refuse_discarded(cls, AsyncRequestHandler, _AWAITED)

    def __init__(self, entry: Entry) -> None:
        super().__init__(entry)
        self._coroutine: Coroutine[Want[Any], Any, None] = self.handle()
        self._waits: Want[Any] = NOTHING

    async def handle(self) -> None:
        """Serve the request; when it returns, what was sent is flushed, then the connection is closed."""
        raise HandlerError(str(self._unfit()))

    @classmethod
    def _unfit(cls) -> str | None:
        if cls.handle is not AsyncRequestHandler.handle:
            return None
        return f"{cls.__name__} must define async def handle(self) ({place_of(cls)})"

    def read(self, want: Want[T], timeout: float | None = None) -> Awaitable[T]:
        """What `want` asks for. `timeout` is in seconds; None: as the server allows.

        At the peer's end of file `line`, `chunk` and `rest` give what is left, b"" in the end; `exactly` and `until`
        raise IncompleteRead, which carries it. Raises TimeoutError and LimitExceeded.
        """
        if timeout is not None:
            check_timeout(timeout)
        self.entry.timeout = timeout
        return want

    def send(self, data: bytes | bytearray | memoryview) -> Awaitable[None]:
        """Queue output. Awaiting suspends only while more than the high-water mark waits for the peer to take it.

        Without `await` it is sent all the same, but nothing holds up a handler that is faster than its peer: above the
        mark that is a RuntimeWarning, once for each line, and above `output_bytes_max` LimitExceeded.
        """
        self._send(data)
        entry = self.entry
        table = entry.table
        step = table.elsewhere.get(entry) if table.elsewhere else None
        held = entry.output.held if step is None else step.output.held
        if held <= table.limits.high_water_bytes:
            return _DONE
        is_own = entry is table.running if step is None else step.thread == get_ident()
        return Room() if is_own else _DONE  # who sends to another request can't wait for that one's peer

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
        except (RuntimeError, AttributeError) as error:
            _explain(error)
            raise
        return want if isinstance(want, Want) else self._refuse(want)

    def _throw(self, error: BaseException) -> Want[Any] | None:
        if isinstance(error, IncompleteRead) and self._waits.takes_partial:
            return self._resume(error.partial)
        self.entry.timeout = None
        try:
            want = self._waits = self._coroutine.throw(error)
        except StopIteration:
            return None
        except (RuntimeError, AttributeError) as raised:
            _explain(raised)
            raise
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
            InvalidTransition(f"{type(self).__name__}.handle awaited {awaited!r}, which is not a want: {_NO_ASYNCIO}")
        )


def _explain(error: Exception) -> None:
    """Where another library misses its own loop, say why there is none."""
    if any(words in str(error) for words in _NO_LOOP):
        error.add_note(_NO_ASYNCIO)
