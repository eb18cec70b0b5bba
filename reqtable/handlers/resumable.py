"""The base of state and async handlers: their entry, their fields, and sending.

A resumable handler does no I/O: it says what it waits for, receives that, and queues output. So it runs on any
transport and under any policy, and its tests need no sockets and no clock.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from copy import deepcopy
from threading import Lock, get_ident
from types import FunctionType, MemberDescriptorType
from typing import Any, BinaryIO, ClassVar, get_origin

from reqtable.handlers.finding import Finding, refusal
from reqtable.net.files import size_of
from reqtable.net.sockets import is_tls
from reqtable.table.addresses import address_text
from reqtable.table.engine_wants import ENDED
from reqtable.table.errors import HandlerError, LimitExceeded
from reqtable.table.output import FileSlice, Output
from reqtable.table.places import owner_of, place_of
from reqtable.table.reach import Reach
from reqtable.table.reaching import Arrived
from reqtable.table.states import State
from reqtable.table.table import Entry
from reqtable.table.want import Want

log = logging.getLogger("reqtable")

_TELLING = Lock()  # several threads may tell a request something
_OVER = {State.LINGERING, State.CLOSED}


def declared_fields(cls: type) -> tuple[str, ...]:
    """Return the names of the fields of `cls`: the annotated names of the class, its bases and its mix-ins.

    The nearest annotation decides, as for an attribute. A ClassVar is not a field, nor is a name that begins with an
    underscore, nor a name that another of these classes uses for a method or a property.
    """
    nearest: dict[str, tuple[type, Any]] = {}
    for base in reversed(cls.__mro__):
        nearest |= {name: (base, hint) for name, hint in inspect.get_annotations(base).items()}
    return tuple(
        name
        for name, (base, hint) in nearest.items()
        if name[0] != "_" and name != "entry" and not _is_class_var(hint) and not _is_bound_by(cls, name, base)
    )


def _is_class_var(hint: Any) -> bool:
    if isinstance(hint, str):  # under `from __future__ import annotations`
        return hint.partition("[")[0].rpartition(".")[2] == "ClassVar"
    return hint is ClassVar or get_origin(hint) is ClassVar


def _is_bound_by(cls: type, name: str, annotated_in: type) -> bool:
    """Return whether `name` is a property, or a method in another class than `annotated_in`."""
    owner = owner_of(cls, name)
    if owner is None:
        return False
    value = vars(owner)[name]
    return isinstance(value, property) or (owner is not annotated_in and hasattr(value, "__get__"))


def _not_bytes(data: Any) -> str:
    said = f"send() takes bytes, not {type(data).__name__}"
    if isinstance(data, Want):
        return f"send() takes bytes, not the want {data!r}: write data = await self.read({data!r})"
    if isinstance(data, Arrived):
        return f"{said}: either() gives the pair of an index and an item: send its item"
    if inspect.iscoroutine(data):
        return f"{said}: await it"
    return f"{said}: write send(text.encode())" if isinstance(data, str) else said


_AWAITING = "write the handler as a reqtable.AsyncRequestHandler"


def check_called(function: Any, given: tuple[str, ...], named: tuple[str, ...] = (), awaiting: str = _AWAITING) -> None:
    """Raise HandlerError if the engine can't call `function` as a plain function with the arguments `given`.

    Those `named` are given by name. `awaiting` says what to do in place of an `await`.
    """
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        text = f"{function.__qualname__} is async def, but is called as a plain function"
        raise refusal("async", place_of(function), text, f"make it a plain def, or {awaiting}")
    if inspect.isgeneratorfunction(function):
        text = f"{function.__qualname__} has a yield, but is called as a plain function"
        raise refusal("generator", place_of(function), text, "write return instead")
    if isinstance(function, FunctionType):
        try:
            inspect.signature(function).bind(*given, **dict.fromkeys(named))
        except TypeError as error:
            arguments = ", ".join(given + named)
            text = f"{function.__qualname__} is called with ({arguments}), but takes other arguments ({error})"
            mend = f"write def {function.__name__}({arguments})"
            raise refusal("arguments", place_of(function), text, mend) from None


# The hooks that are called for a server and not for a request, with the arguments of the engine's call.
_OF_CLASS = {
    "on_start": ("cls", "server"),
    "on_stop": ("cls", "server"),
    "save_state": ("cls", "server"),
    "restore_state": ("cls", "server", "data"),
}
_FOR_SERVER = "for the server and not for a request"


def check_class_method(cls: type, name: str, given: tuple[str, ...], common: type, when: str = _FOR_SERVER) -> None:
    """Raise HandlerError if `cls` has, as its `name`, anything but a class method that is called with `given`.

    `common` is the class that has the default.
    """
    owner = owner_of(cls, name)
    if owner is None or owner is common:
        return
    method = vars(owner)[name]
    if not isinstance(method, classmethod):
        text = f"{owner.__name__}.{name} must be a class method, because it is called {when}"
        mend = f"write @classmethod, then def {name}({', '.join(given)})"
        raise refusal("class-method", place_of(method), text, mend)
    check_called(method.__func__, given)


def _needs_copying(cls: type, name: str) -> bool:
    """Return whether each request needs a copy of a field's default: it is mutable, or would bind as a method."""
    owner = owner_of(cls, name)
    if owner is None:
        return False
    default = vars(owner)[name]
    if isinstance(default, MemberDescriptorType):  # a slot: there is no default
        return False
    try:
        return deepcopy(default) is not default or hasattr(default, "__get__")
    except Exception as error:
        text = f"{cls.__name__}.{name}: each request gets a copy of the default, but {default!r} can't be copied"
        mend = "annotate it as ClassVar to share it, or set it when the request begins"
        raise refusal("default", place_of(cls), f"{text} ({error})", mend) from None


class ResumableHandler:
    """Holds a request's fields and queues its output; `entry` is the request's row in the table."""

    bound_to_thread: ClassVar[bool] = False

    _hooks: ClassVar[dict[str, tuple[str, ...]]] = {"on_close": ("self",)}  # name -> arguments of the engine's call

    _asks_policy: ClassVar[bool] = False  # its steps run on the loop; it has its policy run what may take long

    _awaiting: ClassVar[str] = _AWAITING  # what the author of an `async def` is told to do in its place

    _needs_stream: ClassVar[bool] = False  # it can't serve datagrams

    _awaits: ClassVar[bool] = False  # what `send` returns is to be awaited

    _begins_in: ClassVar[str] = "handle()"  # where a handler sets up a request

    _fields: ClassVar[tuple[str, ...]] = ()

    _copied: ClassVar[tuple[str, ...]] = ()  # fields whose default each request gets a copy of

    # Its client gets one answer to each request. So a request that ends early may have last words: see `_last_words`.
    _owes_answers: ClassVar[bool] = False

    _pinned: ClassVar[dict[str, str]] = {}  # state -> the policy that its `dispatch` names

    entry: Entry

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, given in cls._hooks.items():
            check_called(getattr(cls, name), given, awaiting=cls._awaiting)
        for name, given in _OF_CLASS.items():
            check_class_method(cls, name, given, ResumableHandler)
        cls._fields = declared_fields(cls)
        cls._copied = tuple(name for name in cls._fields if _needs_copying(cls, name))

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        for name in self._copied:
            setattr(self, name, deepcopy(getattr(type(self), name)))

    @classmethod
    def _unfit(cls) -> Finding | None:
        """Return why this class can't serve requests; None if it can."""
        return None

    @property
    def client_address(self) -> Any:
        """The peer's address, in the form of the socket module."""
        return self.entry.peer

    @property
    def server(self) -> Any:
        """The server that this request came to; `self.server.table` is the table."""
        return self.entry.server

    @property
    def tls(self) -> Any:
        """The request's `ssl.SSLSocket`, for `getpeercert()` and `selected_alpn_protocol()`; None without TLS."""
        request = self.entry.transport.request
        return request if is_tls(request) else None

    def _send(self, data: bytes | bytearray | memoryview) -> None:
        """Queue output, which the engine flushes once after the step. Other requests may call this too.

        Raises LimitExceeded if more than `output_bytes_max` bytes would wait for the peer.
        """
        entry = self.entry
        table, output = entry.table, entry.output
        if (  # fast path of _queue: the first output of the step that the loop runs
            entry is table.running
            and output.first is None
            and type(data) is bytes
            and 0 < len(data) <= table.limits.output_bytes_max
            and table.thread in (None, get_ident())
        ):
            output.first = data
            output.size = output.held = len(data)
        else:
            self._queue(data)

    def _queue(self, data: bytes | bytearray | memoryview) -> None:
        if type(data) is not bytes:
            if not isinstance(data, bytes | bytearray | memoryview):
                raise TypeError(_not_bytes(data))
            data = bytes(data)  # a copy: the caller may change its own
        entry = self.entry
        table, output = entry.table, entry.output
        held = output.held
        is_others = False  # sent by another request's step, or by the program
        if entry is not table.running or table.thread not in (None, get_ident()):
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
            # the sender is not to blame: close this request instead
            log.warning(
                "%s: closed: more than %d bytes of output wait for the peer",
                address_text(entry.peer),
                table.limits.output_bytes_max,
            )
            table.cancel(entry.id)
            return
        if is_others:
            table.touched.append(entry)
        if data or not entry.input.is_stream:  # an empty datagram is sent, too
            output.append(data)

    def send_file(self, file: BinaryIO, offset: int = 0, count: int | None = None) -> None:
        """Queue `count` bytes of `file` from `offset`; None: up to its end. The kernel copies them if it can.

        The file must stay open until the bytes are sent (`flushed()`); the caller closes it. Raises ValueError for a
        negative count or offset, and, without a count, for a file of unknown size, such as a pipe or one in /proc.
        """
        if count is None:
            count = size_of(file) - offset
        if offset < 0 or count < 0:
            raise ValueError(f"send_file() can't send {count} bytes from offset {offset}")
        entry = self.entry
        table = entry.table
        output = entry.output
        if entry is not table.running or table.thread not in (None, get_ident()):
            elsewhere = self._output_from_outside(self.send_file, file, offset, count)
            if elsewhere is None:
                return
            output = elsewhere
            if output is entry.output:
                table.touched.append(entry)
        if count:
            output.append_file(FileSlice(file, offset, count))

    def tell(self, item: Any) -> bool:
        """Give this request an item, which its `told()` takes. Callable from any request and any thread.

        Returns False if the item is not taken: the request is over, `told_max` items wait for it already, or this is a
        forked child and the request is the parent's.
        """
        entry = self.entry
        table = entry.table
        with _TELLING:
            if not self._is_open() or table.owner is None or table.owner.is_copy:
                return False
            reach = entry.reach = entry.reach or Reach()
            if len(reach.told) >= table.limits.told_max:
                return False
            reach.told.append(item)
            is_first = len(reach.told) == 1  # otherwise the request has been woken already
        if is_first:
            if table.thread is None or table.thread == get_ident():
                table.touch(entry)
            else:
                table.owner.post(table.touch, entry)
        return True

    def _output_from_outside(self, again: Callable[..., None], *args: Any) -> Output | None:
        """Return the output that takes a send from outside the step that the loop runs; None if nothing is sent now.

        A step that runs in another thread has its own output. Any other thread must not touch the request's output: it
        has the loop call `again(*args)`. A request that is over takes nothing.
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
        """Return whether others may still send to this request: nothing may follow its last answer."""
        if self.entry.state is State.DELEGATED:
            raise HandlerError(f"request {self.entry.id} is in a child process: nothing can be sent to it from here")
        return self.entry.state not in _OVER and self.entry.want is not ENDED

    @classmethod
    def on_start(cls, server: Any) -> None:
        """Prepare what all requests of `server` share. Called once when it begins to serve, before its first request.

        The server serves nothing if this raises an exception.
        """

    @classmethod
    def on_stop(cls, server: Any) -> None:
        """Clean up what `on_start` prepared. Called once when `server` stops serving, after its last request."""

    def _leave(self) -> None:
        """In the parent: free the handler's copy of a request that a forked child has."""

    @property
    def _is_partial(self) -> bool:
        """Whether the client has part of an answer, or will get it, so that no other answer can follow."""
        return False

    def _last_words(self) -> bytes:
        """Return the answer to the request, which ends before it has one; b"" if it can't be answered any more."""
        reach = self.entry.reach
        return b"" if self._is_partial else self._apology(reach is not None and bool(reach.connections))

    def _apology(self, has_connections: bool) -> bytes:
        """Return the answer to a request that ends before it has one, or b"". It may wait for another connection."""
        return b""

    def on_close(self) -> Any:
        """Clean up: the request has ended, for whatever reason. Called once, as the last method; nothing can be sent.

        The result is ignored.
        """
