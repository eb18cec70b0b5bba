"""`AsyncRequestHandler`: a request as a coroutine that awaits wants.

The table's loop runs it. There is no asyncio inside: a handler awaits wants, and its own coroutines that await wants.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Awaitable, Callable, Coroutine
from threading import get_ident
from typing import Any, ClassVar, TypeVar, cast

from reqtable.handlers.discarded import refuse_discarded
from reqtable.handlers.finding import Finding, refusal
from reqtable.handlers.resumable import ResumableHandler
from reqtable.table.arguments import check_timeout
from reqtable.table.errors import HandlerError, IncompleteRead, InvalidTransition
from reqtable.table.places import functions_in, place_in, place_of
from reqtable.table.room import DONE, Room
from reqtable.table.table import Entry
from reqtable.table.want import Want
from reqtable.table.wants import NOTHING, call, flushed, hand_off, sleep

T = TypeVar("T")

_AWAITED = ("read", "sleep", "call", "hand_off")  # the methods that do nothing unless awaited
_NO_LOOP = ("event loop", "async context", "create_future")  # phrases of asyncio's, trio's and anyio's errors
_NO_ASYNCIO = (
    "there is no asyncio inside: an AsyncRequestHandler awaits self.read(…), self.send(…), self.sleep(…) or "
    "self.call(…); run code that needs its own event loop in self.call(…)"
)


class AsyncRequestHandler(ResumableHandler):
    """Serves a request with the coroutine `handle`, which a handler redefines."""

    _awaits: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raise HandlerError if `handle` is not a coroutine function, or if a want is made but not awaited."""
        super().__init_subclass__(**kwargs)
        functions = list(functions_in(cls.handle))
        if functions and not any(inspect.iscoroutinefunction(each) for each in functions):
            text = f"{cls.__name__}.handle is not a coroutine function"
            raise refusal("handle", place_of(cls.handle), text, "write async def handle(self), without a yield")
        refuse_discarded(cls, AsyncRequestHandler, _AWAITED)

    def __init__(self, entry: Entry) -> None:
        super().__init__(entry)
        self._coroutine: Coroutine[Want[Any], Any, None] = self.handle()
        self._waits: Want[Any] = NOTHING

    async def handle(self) -> None:
        """Serve the request. When this returns, the engine sends the remaining output and closes the connection."""
        raise HandlerError(str(self._unfit()))

    @classmethod
    def _unfit(cls) -> Finding | None:
        if cls.handle is not AsyncRequestHandler.handle:
            return None
        return Finding("handle", place_of(cls), f"{cls.__name__} has no handle", "write async def handle(self)")

    def read(self, want: Want[T], timeout: float | None = None) -> Awaitable[T]:
        """Return the item that `want` asks for. `timeout` is in seconds; None: as the server allows.

        At the peer's end of file, `line`, `chunk` and `rest` return what is left, and b"" after that; `exactly` and
        `until` raise IncompleteRead, whose `partial` is what is left. Raises TimeoutError and LimitExceeded.
        """
        if timeout is not None:
            check_timeout(timeout)
        self.entry.timeout = timeout
        return want

    def send(self, data: bytes | bytearray | memoryview) -> Awaitable[None]:
        """Queue output. Awaiting suspends only while the peer has more than `high_water_bytes` still to take.

        Without `await` the data is sent all the same, but a handler may outrun its peer: above `high_water_bytes` it
        gets a RuntimeWarning, once for each line of code, and above `output_bytes_max` it gets LimitExceeded.
        """
        self._send(data)
        entry = self.entry
        table = entry.table
        step = table.elsewhere.get(entry) if table.elsewhere else None
        held = entry.output.held if step is None else step.output.held
        if held <= table.limits.high_water_bytes:
            return DONE
        is_own = entry is table.running if step is None else step.thread == get_ident()
        # A handler can't wait for the peer of another request.
        return Room(flushed(), warns=entry.reach is None) if is_own else DONE

    def sleep(self, seconds: float) -> Awaitable[None]:
        """Wait for `seconds`; other requests go on."""
        return sleep(seconds)

    def call(self, fn: Callable[..., T], *args: Any, on: str | None = None, **kwargs: Any) -> Awaitable[T]:
        """Return `fn(*args, **kwargs)`, run by executor `on` (None: the configured one). Raises what `fn` raises."""
        return call(fn, *args, on=on, **kwargs)

    def hand_off(self, policy: str) -> Awaitable[None]:
        """Run the rest of the request under `policy`: `"thread"`, `"pool"` or `"fork"`."""
        return hand_off(policy)

    # -- for the engine -----------------------------------------------------------------------------------------------

    def _where(self) -> tuple[str | None, str | None]:
        """Return None, because a coroutine has no states, and `file:line` of the `await` at which it waits."""
        frame, inner = None, cast(Any, self._coroutine)
        while (found := getattr(inner, "cr_frame", None)) is not None:  # the innermost coroutine of the user's
            frame, inner = found, inner.cr_await
        return None, place_in(frame)

    def _resume(self, item: Any) -> Want[Any] | None:
        self.entry.timeout = None  # each read sets its own
        try:
            want = self._waits = self._coroutine.send(item)
        except StopIteration:
            return None
        except (RuntimeError, AttributeError, TypeError) as error:
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
        except (RuntimeError, AttributeError, TypeError) as raised:
            _explain(raised)
            raise
        return want if isinstance(want, Want) else self._refuse(want)

    def _close(self) -> None:
        try:
            self._coroutine.close()
        finally:
            self.on_close()

    def _leave(self) -> None:
        with contextlib.suppress(Exception):  # the child has the coroutine; this is a copy
            self._coroutine.close()

    def _refuse(self, awaited: object) -> Want[Any] | None:
        """Raise InvalidTransition in the handler, at its `await` of what is not a want."""
        self._waits = NOTHING
        return self._throw(
            InvalidTransition(f"{type(self).__name__}.handle awaited {awaited!r}, which is not a want: {_NO_ASYNCIO}")
        )


def _explain(error: Exception) -> None:
    """Add a note to an error of a library that needs its own event loop, or of awaiting what is no want."""
    if isinstance(error, TypeError):
        if "can't be used in 'await' expression" in str(error):
            error.add_note("await takes a want: write await self.read(line()), or await self.read(upstream.line())")
        return
    if any(words in str(error) for words in _NO_LOOP):
        error.add_note(_NO_ASYNCIO)
