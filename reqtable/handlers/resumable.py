"""What state and async handlers share: their entry, and sending.

A resumable handler does no I/O: it says what it waits for, is given it, and queues output. So it runs on any transport
and under any policy, and is tested with no sockets and no clock.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable
from copy import deepcopy
from threading import get_ident
from typing import Any, BinaryIO, ClassVar, get_origin

from reqtable.core.addresses import address_text
from reqtable.core.buffers import FileSlice, Output
from reqtable.core.compiled import mypyc_attr
from reqtable.core.errors import HandlerError, LimitExceeded
from reqtable.core.states import State
from reqtable.core.table import Entry
from reqtable.core.wants import ENDED
from reqtable.engine.transports import is_tls

log = logging.getLogger("reqtable")

_IMMUTABLE = (int, float, complex, str, bytes, bool, tuple, frozenset, type(None))
_OVER = {State.LINGERING, State.CLOSED}


def declared_fields(cls: type) -> list[str]:
    """The names that `cls` itself annotates, but for ClassVars and underscored ones."""
    hints = inspect.get_annotations(cls)
    return [name for name, hint in hints.items() if name[0] != "_" and not _is_class_var(hint)]


def _is_class_var(hint: Any) -> bool:
    if isinstance(hint, str):  # under `from __future__ import annotations`
        return hint.partition("[")[0].rpartition(".")[2] == "ClassVar"
    return hint is ClassVar or get_origin(hint) is ClassVar


@mypyc_attr(allow_interpreted_subclasses=True)
class ResumableHandler:
    """The base of `StateRequestHandler` and `AsyncRequestHandler`; `entry` is the request's row in the table."""

    bound_to_thread: ClassVar[bool] = False

    _copied: ClassVar[dict[str, Any]] = {}  # declared fields whose default is mutable: each request gets its own

    _pinned: ClassVar[dict[str, str]] = {}  # where the steps of a state run that says so itself

    entry: Entry

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        defaults = {name: vars(cls)[name] for name in declared_fields(cls) if name in vars(cls)}
        cls._copied = cls._copied | {k: v for k, v in defaults.items() if not isinstance(v, _IMMUTABLE)}

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        for name, value in self._copied.items():
            setattr(self, name, deepcopy(value))

    @property
    def client_address(self) -> Any:
        """The peer's address, as its socket gives it."""
        return self.entry.peer

    @property
    def server(self) -> Any:
        """The server that this request came to; `self.server.table` is the table."""
        return self.entry.server

    @property
    def tls(self) -> Any:
        """The request's `ssl.SSLSocket`, for `getpeercert()`, `selected_alpn_protocol()`; None in the clear."""
        request = self.entry.transport.request
        return request if is_tls(request) else None

    def _send(self, data: bytes | bytearray | memoryview) -> None:
        """Queue output: the engine flushes it once after the step. From another request's step it works as well.

        Raises LimitExceeded where more than `output_bytes_max` would be waiting for the peer to take it.
        """
        if type(data) is not bytes:
            if not isinstance(data, bytes | bytearray | memoryview):
                raise TypeError(f"send() takes bytes, not {type(data).__name__}")
            data = bytes(data)  # it may change before it has left
        entry = self.entry
        table = entry.table
        output = entry.output
        held = output.held
        is_others = False  # another request's step sends, or the program
        if entry is not table.running or get_ident() != (table.thread or get_ident()):
            elsewhere = self._output_from_outside(self._send, data)
            if elsewhere is None:
                return
            is_others = elsewhere is output
            if not is_others:
                output = elsewhere
                held += output.held
        if held + len(data) > table.limits.output_bytes_max:
            if not is_others:
                raise LimitExceeded("untaken output", table.limits.output_bytes_max)
            # the sender is not to blame, and is not held up
            log.warning(
                "%s: closed: more than %d bytes of output wait for it",
                address_text(entry.peer),
                table.limits.output_bytes_max,
            )
            table.cancel(entry.id)
            return
        if is_others:
            table.touched.append(entry)
        if output.first is None and data:  # what appending comes to, mostly
            output.first = data
            output.size = output.held = len(data)
        elif data or not entry.input.is_stream:  # a datagram of no bytes is one
            output.append(data)

    def send_file(self, file: BinaryIO, offset: int = 0, count: int | None = None) -> None:
        """Queue `count` bytes of `file` from `offset` (None: up to its end). The kernel copies them where it can.

        The file must stay open until they are sent (`flushed()`); closing it is the caller's.
        """
        if count is None:
            try:
                count = os.fstat(file.fileno()).st_size - offset
            except (AttributeError, OSError):
                count = file.seek(0, os.SEEK_END) - offset
        if offset < 0 or count < 0:
            raise ValueError(f"send_file() can't send {count} bytes from offset {offset}")
        entry = self.entry
        table = entry.table
        output = entry.output
        if entry is not table.running or get_ident() != (table.thread or get_ident()):
            elsewhere = self._output_from_outside(self.send_file, file, offset, count)
            if elsewhere is None:
                return
            output = elsewhere
            if output is entry.output:
                table.touched.append(entry)
        if count:
            output.append_file(FileSlice(file, offset, count))

    def _output_from_outside(self, again: Callable[..., None], *args: Any) -> Output | None:
        """Where a send goes that is not of the step that the loop is in; None where it goes nowhere, at least not now.

        A step that runs in another thread has an output of its own. Any other thread has the loop send, `again`: the
        output of a request is its own loop's.
        """
        entry = self.entry
        table = entry.table
        thread = get_ident()
        step = table.elsewhere.get(entry)
        if step is not None and step.thread == thread:
            return step.output
        if table.owner is not None and thread != (table.thread or thread):
            table.owner.post(again, *args)
            return None
        return entry.output if self._is_open() else None

    def _is_open(self) -> bool:
        """Whether others may still send to this request: nothing shall follow its last answer."""
        if self.entry.state is State.DELEGATED:
            raise HandlerError(f"request {self.entry.id} is in a child process: nothing can be sent to it from here")
        return self.entry.state not in _OVER and self.entry.want is not ENDED

    def _leave(self) -> None:
        """A child process has the request: free what is held here."""

    def on_close(self) -> Any:
        """The request has ended, however it did. Called once, last; nothing can be sent any more.

        What it returns is ignored."""
