"""`state_version` and `migrate`: how a request goes on with other code than the code that began it."""

from __future__ import annotations

import reprlib
from typing import Any

from reqtable.handlers.declaration import is_state
from reqtable.handlers.finding import refusal
from reqtable.handlers.resumable import check_class_method
from reqtable.table.errors import HandlerError
from reqtable.table.places import place_of

_ARGUMENTS = ("cls", "version", "state", "fields")


def check_migration(cls: Any, common: Any) -> None:
    """Raise HandlerError if the `state_version` or the `migrate` of a handler class can't be used.

    `common` is the class that has the defaults.
    """
    version = cls.state_version
    if type(version) is not int:
        text = f"{cls.__name__}.state_version must be a whole number, not {version!r}"
        raise refusal("version", place_of(cls), text, "write state_version = 2")
    if "state_version" in cls._fields:
        text = f"{cls.__name__}.state_version belongs to the class, but its annotation declares a field of each request"
        raise refusal("version", place_of(cls), text, f"write state_version = {version}")
    check_class_method(cls, "migrate", _ARGUMENTS, common, "for a request that has no handler yet")


def migrated(
    cls: Any, id: int, version: int, state: str | None, fields: dict[str, Any]
) -> tuple[str | None, dict[str, Any]]:
    """Return the state and the fields of a request of another `version`, as `migrate` makes them.

    Raises HandlerError if there is no `migrate`, if it fails, or if it returns something else.
    """
    name = cls.__name__
    if not cls._migrates():
        raise HandlerError(
            f"{name} has state_version {cls.state_version}, but request {id} is of version {version}: write "
            f"migrate(cls, version, state, fields) ({place_of(cls)})"
        )
    try:
        made = cls.migrate(version, state, fields)
    except Exception as error:
        raise HandlerError(
            f"{name}.migrate raised {error!r} for request {id} of version {version} ({place_of(cls.migrate)})"
        ) from error
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], str | None) and type(made[1]) is dict):
        raise HandlerError(
            f"{name}.migrate returned {reprlib.repr(made)}: return the name of a state, and a dict of the fields "
            f"({place_of(cls.migrate)})"
        )
    return made


def check_saved(cls: Any, version: int, state: str | None, fields: dict[str, Any]) -> None:
    """Raise HandlerError if a request in that state, with these fields, can't go on with this class."""
    if state is not None and not is_state(getattr(cls, state, None)):
        kind, lost, known = "state", state, [*cls._declared()]
    elif unknown := [name for name in fields if name not in cls._fields and name not in cls._kept]:
        kind, lost, known = "field", unknown[0], [*cls._fields]
    else:
        return
    name = cls.__name__
    if version == cls.state_version:
        which = "in which a request is" if kind == "state" else "which a request has"
        problem = f"{name} has no {kind} {lost!r}, {which}: raise state_version, and write migrate()"
        raise HandlerError(f"{problem} ({place_of(cls)})")
    problem = f"migrate() returned the {kind} {lost!r}, which {name} lacks: it has {', '.join(known) or 'none'}"
    raise HandlerError(f"{problem} ({place_of(cls.migrate)})")
