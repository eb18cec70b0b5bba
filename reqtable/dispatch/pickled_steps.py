"""Shipping steps of a state machine to another process, as data.

A step request carries the handler's class by name (and by file), its state, its fields, and the step's item or error.
The step result carries the fields, the output, the want, and the error if there was one. The handler in the table is a
copy, which each result brings up to date. The handler's code runs only in the other process.
"""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import lru_cache, partial
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, ClassVar, NamedTuple

from reqtable.config.import_string import module_at
from reqtable.dispatch.pools import portable
from reqtable.dispatch.remote_steps import RemoteSteps
from reqtable.handlers.state import StateRequestHandler
from reqtable.loop.failures import tell_server
from reqtable.net.connection import connect
from reqtable.table.connecting import Connect, StartTLS, start_tls
from reqtable.table.errors import ConfigurationError, HandlerError
from reqtable.table.input import Inbox
from reqtable.table.limits import Limits
from reqtable.table.parts import RELEASED
from reqtable.table.record import Record, record_of
from reqtable.table.snapshot import handler_name
from reqtable.table.table import Entry, RequestTable
from reqtable.table.want import Want
from reqtable.table.wants import NOTHING

_REFERENCES: dict[type, Reference | type] = {}  # of the classes that were looked up before


class Reference(NamedTuple):
    """Says where another process finds a class."""

    module: str
    name: str
    path: str | None


class StepRequest(NamedTuple):
    """Carries a step to another process, pickled: the request without its buffers, and the method to call."""

    record: Record
    method: str  # "_resume", "_throw" or "on_close"
    argument: Any
    limits: Limits
    is_stream: bool
    is_draining: bool  # the server ends once its requests are done


class StepResult(NamedTuple):
    """Carries the outcome of a step back, pickled: the request after the step, and what the step sent."""

    record: Record | None  # None: the request can't be pickled, and `error` says so
    unsent: tuple[bytes, ...]
    ends: bool  # the step returned None
    error: BaseException | None


def check_pickled(handler_class: Any, policy: str, by_import: bool = True) -> None:
    """Raise ConfigurationError, with the reason, if steps of that class can't be shipped.

    With `by_import`, another process must be able to import the class. A forked child need not: it has the class.
    """
    name = handler_name(handler_class)
    if isinstance(handler_class, partial):
        raise ConfigurationError(
            f"{name} can't run under policy {policy!r} as a functools.partial, whose arguments are not shipped: "
            "give the class itself, and declare the arguments as fields with defaults"
        )
    if not (isinstance(handler_class, type) and issubclass(handler_class, StateRequestHandler)):
        raise ConfigurationError(
            f"{name} can't run under policy {policy!r}, which ships steps as data: only a StateRequestHandler is data"
        )
    if handler_class._no_data:
        raise ConfigurationError(
            f"{name} can't run under policy {policy!r}, which ships steps as data: it holds what is no data (when "
            f"{', or when '.join(handler_class._no_data.values())}): choose 'inline', 'pool', 'thread' or 'fork'"
        )
    use = _use_of_connections(handler_class)
    if use is not None:
        raise ConfigurationError(
            f"{name} can't run under policy {policy!r}, which ships steps as data: {use}, and a connection can't be "
            "shipped: choose 'inline', 'pool' or 'thread'"
        )
    if by_import:
        reference_to(handler_class)
    for field in handler_class.field_names():
        if hasattr(handler_class, field):
            try:
                pickle.dumps(getattr(handler_class, field))
            except Exception as error:
                raise ConfigurationError(
                    f"{name} can't run under policy {policy!r}: its field {field!r} can't be pickled: {error}"
                ) from error


def _use_of_connections(handler_class: type[StateRequestHandler]) -> str | None:
    """Say which method of the handler opens a connection, as far as its code tells; None if there is none."""
    for base in handler_class.__mro__:
        if base.__module__.partition(".")[0] == __name__.partition(".")[0]:
            continue
        for name, value in vars(base).items():
            if not isinstance(value, FunctionType):
                continue
            declared = getattr(value, "declaration", None)
            if declared is not None and isinstance(declared.want, Connect | StartTLS):
                return f"the state {name} waits for {declared.want!r}"
            names = value.__code__.co_names
            used = [value.__globals__.get(each) for each in names]
            used += [getattr(each, word, None) for each in used if isinstance(each, ModuleType) for word in names]
            for each in used:
                if each is connect or each is start_tls:
                    return f"{name} uses {each.__name__}()"
    return None


def reference_to(handler_class: Any) -> Reference:
    """Return where another process finds that class. Raises ConfigurationError if it can't be found."""
    name = handler_class.__qualname__
    module = sys.modules.get(handler_class.__module__)
    path = getattr(module, "__file__", None)
    if "<locals>" in name or module is None or _looked_up(module, name) is not handler_class:
        raise ConfigurationError(
            f"{name} can't be shipped to another process, which finds it by its name: define it at the top of a module"
        )
    if path is None and handler_class.__module__ == "__main__":
        raise ConfigurationError(f"{name} can't be shipped to another process: put it into a file")
    return Reference(handler_class.__module__, name, None if path is None else str(Path(path).resolve()))


class PickledSteps(RemoteSteps):
    """Runs steps in another process. Each step gets a new handler, made from what was shipped."""

    bound_to_thread: ClassVar[bool] = False

    def __init__(self, entry: Entry, handler: Any, executor: Executor) -> None:
        super().__init__(entry, handler)
        self._executor = executor
        handler_class = type(handler)
        self._reference = _REFERENCES.get(handler_class) or _REFERENCES.setdefault(
            handler_class, _reference(handler_class)
        )

    def _submit(self, method: str, argument: Any) -> Future[Any]:
        entry = self._entry
        handler = self._handler
        _check_declared(handler)  # a state pinned to the loop may have set an undeclared attribute
        try:
            record = record_of(entry, handler, buffers=False)
            is_draining = bool(getattr(entry.server, "_is_draining", False))
            data = pickle.dumps(
                StepRequest(record, method, argument, entry.table.limits, entry.input.is_stream, is_draining)
            )
        except Exception as error:
            raise HandlerError(f"{self._step()} can't be shipped: {type(error).__name__}: {error}") from error
        return self._executor.submit(run_step, self._reference, data)

    def _arrive(self, done: Future[Any]) -> Want[Any] | None:
        error = None if done.cancelled() else done.exception()
        if error is not None or done.cancelled():
            how = f"{type(error).__name__}: {error}" if error else "it was cancelled"
            raise HandlerError(f"the worker that ran {self._step()} failed: {how}") from error
        back: StepResult = _unpacked(done.result())
        for piece in back.unsent:
            self._entry.output.append(piece)
        if back.record is not None:
            record = back.record
            begun, now = record.begun_s, self._entry.table.now
            self._handler._restore((record.handler_state, record.fields, record.told_of_end), now)
            self._entry.began_at = None if begun is None else now - begun
        if back.error is not None:
            raise back.error
        assert back.record is not None
        self._entry.timeout = record.timeout_s
        return None if back.ends else record.want

    def _close_handler(self) -> None:
        if type(self._handler).on_close is not StateRequestHandler.on_close:
            entry = self._entry
            owner = entry.table.owner
            assert owner is not None
            server, peer, id = entry.server, entry.peer, entry.id

            def report(error: BaseException) -> None:
                try:
                    raise error
                except Exception:
                    tell_server(server, None, peer, error, id)

            def closed(done: Future[Any]) -> None:
                error = None if done.cancelled() else done.exception() or _unpacked(done.result()).error
                if error is not None:
                    owner.post(report, error)

            self._submit("on_close", None).add_done_callback(closed)

    def _step(self) -> str:
        return f"{type(self._handler).__name__}.{self._handler.state_name}"


def _reference(handler_class: type) -> Reference | type:
    """Return where other processes find the class; if they can't, the class itself, which forked children have."""
    try:
        return reference_to(handler_class)
    except ConfigurationError:
        return handler_class


def _unpacked(data: bytes) -> StepResult:
    try:
        return pickle.loads(data)  # type: ignore[no-any-return]
    except Exception as error:
        raise HandlerError(f"the result of a step can't be read: {type(error).__name__}: {error}") from error


# -- in the other process ---------------------------------------------------------------------------------------------


def run_step(reference: Reference | type, data: bytes) -> bytes:
    """Run one step. An error that it raises is returned as data too, with the traceback as a note."""
    handler_class = reference if isinstance(reference, type) else resolve(reference)
    asked: StepRequest = pickle.loads(data)
    record = asked.record
    table = RequestTable(time.monotonic, asked.limits)
    entry = Entry(table, _NoServer(handler_class, asked.is_draining), _HERE, record.peer, record.local, RELEASED)
    if not asked.is_stream:
        entry.input = Inbox()
    if record.begun_s is not None:
        entry.began_at = table.now - record.begun_s
    handler = handler_class(entry)
    handler._restore((record.handler_state, record.fields, record.told_of_end), table.now)
    table.running = entry
    want: Want[Any] | None = None
    error: BaseException | None = None
    try:
        method: Callable[..., Any] = getattr(handler, asked.method)
        want = method() if asked.method == "on_close" else method(asked.argument)
        _check_declared(handler)
    except BaseException as problem:
        error = problem
    if error is not None:
        if not isinstance(error, Exception):
            error = HandlerError(f"a step raised {error!r}").with_traceback(error.__traceback__)
        error = portable(error)
    unsent = tuple(bytes(piece) for piece in entry.output.pieces if isinstance(piece, bytes))
    if len(unsent) < len(entry.output.pieces):
        error = error or HandlerError("send_file() can't be shipped: send the bytes, or pin the state to the loop")
    entry.want = NOTHING if want is None else want
    table.now = table.clock()  # the step has taken time
    name = f"{handler_class.__name__}.{handler.state_name}"
    return _packed(name, entry, handler, StepResult(None, unsent, want is None, error))


def _packed(name: str, entry: Entry, handler: Any, back: StepResult) -> bytes:
    try:
        record = record_of(entry, handler, buffers=False)
        return pickle.dumps(back._replace(record=record))
    except Exception as problem:
        unfit = f"raised {back.error!r}" if back.error is not None else "left fields or returned a want"
        error = HandlerError(f"{name} {unfit} that can't be pickled: {type(problem).__name__}: {problem}")
        return pickle.dumps(back._replace(error=error))


def _check_declared(handler: StateRequestHandler) -> None:
    lost = handler._undeclared()
    if lost is not None:
        raise HandlerError(lost)


@lru_cache(maxsize=256)
def resolve(reference: Reference) -> Any:
    """Return the class in this process. Raises ImportError or AttributeError."""
    module = sys.modules.get(reference.module)
    if module is None or not _is_from(module, reference.path):
        module = _import(reference)
    found = _looked_up(module, reference.name)
    if found is None:
        raise AttributeError(f"{reference.module} has no {reference.name} here")
    return found


def _import(reference: Reference) -> Any:
    """Import the module by its name, or by its file if the name means another file in this process."""
    try:
        spec = importlib.util.find_spec(reference.module)
    except (ImportError, ValueError):
        spec = None
    if spec is not None and (reference.path is None or spec.origin == reference.path):
        return importlib.import_module(reference.module)
    if reference.path is None or not Path(reference.path).is_file():
        raise ImportError(f"module {reference.module} ({reference.path or 'no file'}) can't be imported here")
    return module_at(reference.path)


def _is_from(module: Any, path: str | None) -> bool:
    own = getattr(module, "__file__", None)
    return path is None or (own is not None and str(Path(own).resolve()) == path)


def _looked_up(module: Any, name: str) -> Any:
    found = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


class _NoServer:
    """Stands in for the server, which is in another process."""

    def __init__(self, handler_class: Any, is_draining: bool) -> None:
        self.RequestHandlerClass = handler_class
        self.server_address = None
        self._is_draining = is_draining

    def __getattr__(self, name: str) -> Any:
        raise HandlerError(f"self.server.{name}: this step runs in another process than its server")


class _Here:
    name: ClassVar[str] = "executor"


_HERE: Any = _Here()
