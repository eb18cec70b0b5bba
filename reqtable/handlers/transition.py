"""`Transition`: what a state and a hook may return, in the words of a type checker. Nothing here runs.

`@state` turns a method into a state. A type checker sees this by the return type: a plain method returns a
`Transition`, but a state returns `DecoratedByState`. A decorator above `@state` keeps that type if it has types itself.

A pair of a state and a want fits if the state takes what the want gives. Python has no type for "any such pair", so
`Transition` lists the pairs of the wants that give one well-known type. Every other want fits every state: that of
`call()`, `parsed()` and `told()`, and a want that a program has written itself.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol, TypeVar

from reqtable.net.connection import Connection
from reqtable.table.reaching import Arrived
from reqtable.table.want import WantOf

T_contra = TypeVar("T_contra", contravariant=True)


class DecoratedByState:
    """Stands for the transition that a state has returned, as in `return super().command(text)`."""


class DecoratedByStateWithWant(DecoratedByState):
    """Stands for the transition that a state with a want has returned, as one with `@state(line())`."""


class StateOf(Protocol[T_contra]):
    """A state of a handler that takes an item of this type."""

    def __call__(self, item: T_contra, /) -> DecoratedByState: ...


class StateWithWant(Protocol):
    """A state whose `@state` names a want, so that a transition may leave the want out."""

    def __call__(self, item: Any, /) -> DecoratedByStateWithWant: ...


class OtherWant(Protocol):
    """A want of which only the program knows the item's type."""

    _items: Literal["of any type"]


Transition = (
    StateWithWant
    | StateOf[None]  # without a want, a state gets None
    | tuple[StateOf[bytes], WantOf[bytes]]
    | tuple[StateOf[None], WantOf[None]]
    | tuple[StateOf[bytes | None], WantOf[bytes | None]]
    | tuple[StateOf[str | bytes], WantOf[str | bytes]]
    | tuple[StateOf[Arrived], WantOf[Arrived]]
    | tuple[StateOf[Connection], WantOf[Connection]]
    | tuple[StateOf[Any], OtherWant]
    | DecoratedByState
    | None
)
"""What a state or a hook returns: `self.name`, the pair `self.name, want`, or None, which ends the request."""
