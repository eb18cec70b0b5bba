"""The base of all wants: what `take` and `first` promise. The wants themselves are in `table/wants.py`."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, TypeVar, dataclass_transform

from reqtable.table.input import MISSING, Input, Missing
from reqtable.table.limits import Limits
from reqtable.table.output import Output
from reqtable.table.reach import Reach
from reqtable.table.states import Event

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")


class Surroundings(Protocol):
    """The part of a table that a want of its requests may read."""

    limits: Limits
    now: float  # the time of this pass, in seconds
    driving_policy: (
        str | None
    )  # the policy whose thread or child runs this table, for one request; None: an engine's table


class Waiting(Protocol):
    """The part of a waiting request that its want may read and take from."""

    input: Input
    output: Output
    id: int
    reach: Reach | None  # what the request has beside its client; None: nothing
    result: Any  # the posted item, such as the result of a call; MISSING if nothing was posted

    @property
    def table(self) -> Surroundings: ...


class Want(Generic[T_co]):
    """Says what a request waits for. In an `AsyncRequestHandler`, awaiting a want returns its item."""

    __slots__ = ()

    awaits: ClassVar[Event] = Event.AWAITS_INPUT
    takes_partial: ClassVar[bool] = False  # at end of file, `AsyncRequestHandler.read` returns what is left
    needs_bytes: ClassVar[bool] = False  # a stream with nothing unread can't have the item: `take` is not called
    is_timed: ClassVar[bool] = True  # the handler's timeout runs while the request waits for this want

    if TYPE_CHECKING:
        _items: Literal["of any type"]

    def take(self, entry: Waiting) -> T_co | Missing:
        """Remove the item from `entry` and return it; return `MISSING` if it has not arrived. Raises LimitExceeded."""
        raise NotImplementedError

    def first(self, data: bytes) -> tuple[T_co, int] | Missing | None:
        """Return the item with which `data` begins, and its length, if all that is unread is `data`.

        MISSING: the item has not all arrived. None: `data` must go through the input, where `take` finds the item, or
        raises; that is always right. A want that can have its item of an empty stream returns None. This never raises.
        """
        return None

    def whole(self, data: bytes) -> T_co | Missing:
        """Return the item that `data` is by itself, neither less nor more; else MISSING."""
        found = self.first(data)
        return found[0] if type(found) is tuple and found[1] == len(data) else MISSING

    def __await__(self) -> Generator[Want[T_co], Any, T_co]:
        item: T_co = yield self
        return item

    def __repr__(self) -> str:
        # A factory has the name of its class, in lower case. A protocol's own want need not be a dataclass.
        names: list[str] = [field.name for field in fields(self)] if is_dataclass(self) else []
        values = ", ".join(f"{name}={_name_of(getattr(self, name))}" for name in names)
        return f"{type(self).__name__.lower()}({values})"


class WantOf(Want[T_co]):
    """A want of this package whose items have a well-known type, such as bytes. It runs as any other `Want`.

    A type checker compares this type with what a state takes: see `handlers/transition.py`.
    """

    __slots__ = ()

    if TYPE_CHECKING:
        _items: Literal["of a well-known type"]  # type: ignore[assignment]  # so that it is no `OtherWant`


def _name_of(value: object) -> str:
    """Return the repr of a value. A function has its name instead: its address says nothing to a reader."""
    name = getattr(value, "__qualname__", None)
    return name if isinstance(name, str) else repr(value)


@dataclass_transform(frozen_default=True)
def want_type(cls: type[T]) -> type[T]:
    """Make `cls` an immutable dataclass that keeps `Want`'s repr."""
    return dataclass(frozen=True, slots=True, repr=False)(cls)
