"""Finding a dispatch policy by its name."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING

from reqtable.config import ARGUMENT, DEFAULT
from reqtable.dispatch.policy import Policy
from reqtable.table.errors import ConfigurationError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

# Import paths, so that a program imports only the policies it uses.
_BUILT_IN = {
    "inline": "reqtable.dispatch.policies.inline:Inline",
    "greenlet": "reqtable.dispatch.policies.greenlet:Greenlet",
    "thread": "reqtable.dispatch.policies.thread:Thread",
    "pool": "reqtable.dispatch.policies.pool:Pool",
    "fork": "reqtable.dispatch.policies.fork:Fork",
    "executor": "reqtable.dispatch.policies.executor:ExecutorPolicy",
}


def policy_names() -> list[str]:
    """Return the names that `dispatch=` knows."""
    return sorted({*_BUILT_IN, *(each.name for each in _entry_points())})


def _entry_points() -> Iterable[EntryPoint]:
    from importlib.metadata import entry_points  # slow to import, and seldom needed

    return entry_points(group="reqtable.dispatch")


def policy_named(name: str) -> type[Policy]:
    """Return the policy of that name. Raises ConfigurationError if there is none, or if it can't be imported."""
    try:
        if name in _BUILT_IN:
            module, _, attribute = _BUILT_IN[name].partition(":")
            policy = getattr(import_module(module), attribute)
        else:
            found = [each for each in _entry_points() if each.name == name]
            policy = found[0].load() if found else None
    except ImportError as error:
        raise ConfigurationError(f"dispatch policy {name!r} can't be used here: {error}") from error
    if policy is None:
        raise ConfigurationError(f"there is no dispatch policy {name!r}; there are {', '.join(policy_names())}")
    if not (isinstance(policy, type) and issubclass(policy, Policy)):
        raise ConfigurationError(f"dispatch policy {name!r} is {policy!r}, not a subclass of reqtable.dispatch.Policy")
    return policy


def check_policy(name: str, origin: str) -> None:
    """Raise ConfigurationError if `policy_named` does; the message says where the name came from."""
    try:
        policy_named(name)
    except ConfigurationError as error:
        if origin in (ARGUMENT, DEFAULT):
            raise
        raise ConfigurationError(f"{origin}: {error}") from error
