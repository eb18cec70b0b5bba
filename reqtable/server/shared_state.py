"""State that requests share, such as a chat's rooms: `save_state` returns plain data, `restore_state` takes it back.

A server class may have both hooks as methods, and a handler class as class methods that get the server.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from reqtable.server.hooks import Hook, bound, owners_of
from reqtable.server.hosted import Hosted, server_at
from reqtable.table import plain
from reqtable.table.addresses import address_text
from reqtable.table.errors import HandlerError, NotMovable, ReqtableError

_BYTES_MAX = 2**30 - 2**20  # of what one hook returns: it moves in one message


@dataclass(frozen=True, slots=True)
class Share:
    """Holds the two hooks of one owner of shared state."""

    owner: str  # "server" or "handler"
    save: Hook
    restore: Hook


@dataclass(frozen=True, slots=True)
class SharedState:
    """Holds what one `save_state` has returned, as bytes."""

    owner: str  # "server" or "handler"
    server: str  # its address
    data: bytes


def shares_of(server: Hosted) -> list[Share]:
    """Return the hooks of the state that requests of `server` share. Raises HandlerError if they can't be called."""
    found = []
    for owner, find, given in owners_of(server):
        save = bound(find, "save_state", given)
        restore = bound(find, "restore_state", given, ("data",))
        if save is not None and restore is not None:
            found.append(Share(owner, save, restore))
        elif (alone := save or restore) is not None:
            missing = "restore_state" if save is not None else "save_state"
            raise HandlerError(f"{alone} is there without {missing}: write both, or give it another name")
    return found


def save_states(servers: Iterable[Hosted]) -> list[SharedState]:
    """Return what the hooks `save_state` of all servers return. Raises NotMovable, with the hook, if one can't."""
    return [
        SharedState(share.owner, address_text(server.server_address), _saved(share.save))
        for server in servers
        for share in shares_of(server)
    ]


def _saved(save: Hook) -> bytes:
    try:
        found = save()
    except Exception as error:
        raise NotMovable(f"{save} raised {type(error).__name__}: {error} ({save.place})") from error
    try:
        data = plain.encode(found)
    except NotMovable as error:
        raise NotMovable(f"{save} returned data{plain.place_of(found)} that can't move: {error}") from error
    if len(data) > _BYTES_MAX:
        raise NotMovable(f"{save} returned {len(data)} bytes, and at most {_BYTES_MAX} can move")
    return data


def restore_states(servers: Sequence[Hosted], states: Iterable[SharedState], only_checks: bool = False) -> None:
    """Call the hooks `restore_state` with what was saved. With `only_checks`, find out whether that could be done.

    Raises ReqtableError if a hook is missing, or raises an exception, or the data can't be read.
    """
    for restore, data in list(_matched(servers, states)):
        if not only_checks:
            try:
                restore(data)
            except Exception as error:
                raise ReqtableError(f"{restore} raised {type(error).__name__}: {error} ({restore.place})") from error


def _matched(servers: Sequence[Hosted], states: Iterable[SharedState]) -> Iterator[tuple[Hook, Any]]:
    for state in states:
        server = server_at(servers, state.server)
        shares = [] if server is None else shares_of(server)
        restore = next((share.restore for share in shares if share.owner == state.owner), None)
        if restore is not None:
            try:
                data = plain.decode(state.data, lenient=True)
            except ReqtableError as error:
                raise ReqtableError(f"{restore} can't be given its data: {error}") from error
            yield restore, data
        elif plain.decode(state.data, lenient=True) is not None:  # a program that returns None can give its hooks up
            raise ReqtableError(
                f"nothing takes what save_state of the {state.owner} at {state.server} returned: write restore_state"
            )
