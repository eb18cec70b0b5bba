"""How the batches of several workers become the one answer of their supervisor."""

from __future__ import annotations

import heapq
from itertools import islice
from typing import Any

from reqtable.control.query import ROW_ORDERS, Query
from reqtable.loop.times import LoopTimes


def sorted_rows(query: Query, batches: list[list[Any]]) -> list[Any]:
    """Return the rows of all workers, each of which has sorted its own, in one order."""
    runs = [[row for batch in each for row in batch] for each in batches]
    return list(islice(heapq.merge(*runs, key=ROW_ORDERS[query.sort or "id"]), query.limit))


def summed_groups(by: str, batches: list[list[Any]]) -> list[Any]:
    """Return the groups of all workers, with the same names added up."""
    sums: dict[Any, dict[str, Any]] = {}
    for [groups] in batches:
        for group in groups:
            known = sums.setdefault(group[by], {by: group[by], "count": 0, "buffered": 0})
            known["count"] += group["count"]
            known["buffered"] += group["buffered"]
    return list(sums.values())


def first_found(batches: list[list[Any]]) -> Any:
    """Return what the one worker that knows the request has answered."""
    return next((found for [found] in batches if found is not None), None)


def joined(batches: list[list[Any]]) -> list[Any]:
    """Return the lists of all workers as one."""
    return [item for [found] in batches for item in found]


def summed(batches: list[list[Any]]) -> dict[str, Any]:
    """Return the numbers of all workers added up, with each worker's own under `workers`."""
    own = [found for [found] in batches]
    whole: dict[str, Any] = {
        "entries": 0,
        "connections": 0,
        "entries_max": 0,
        "buffered_bytes": 0,
        "states": {},
        "is_draining": False,
        "loop": LoopTimes().plain(),
        "servers": [],
    }
    for each in own:
        whole = _added(whole, each)
    whole["is_draining"] = bool(own) and all(each["is_draining"] for each in own)
    return {**{name: value for name, value in whole.items() if name != "worker"}, "workers": own}


def summed_taken(taken: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Return what all workers have taken over from other processes; None if none has."""
    own = [each for each in taken if each is not None]
    if not own:
        return None
    sums = {name: sum(each[name] for each in own) for name in ("moved", "giving")}
    return {**sums, **{name: max(each[name] for each in own) for name in ("longest_freeze_s", "ago_s")}}


def summed_machines(batches: list[list[Any]]) -> list[Any]:
    """Return the machines of all workers, with what was recorded of the same handler added up."""
    whole: dict[str, Any] = {}
    for [machines] in batches:
        for each in machines:
            known = whole.setdefault(each["handler"], each)
            if known is not each:
                _add_machine(known, each)
    return list(whole.values())


def _add_machine(known: dict[str, Any], other: dict[str, Any]) -> None:
    for state, more in zip(known["states"], other["states"], strict=True):
        state["now"] += more["now"]
        state["seconds"] += more["seconds"]
        state["stays"] = [sum(pair) for pair in zip(state["stays"], more["stays"], strict=True)]
    moves = {(move["from"], move["to"]): move for move in known["moves"]}
    for move in other["moves"]:
        if (move["from"], move["to"]) in moves:
            moves[move["from"], move["to"]]["count"] += move["count"]
        else:
            known["moves"].append(move)


def _added(one: Any, other: Any, key: str = "") -> Any:
    """Add up numbers, and the numbers in dicts. A list is added item by item; of a longest time, the longer is kept."""
    if not one:
        return other
    if isinstance(other, dict):
        return {**one, **{name: _added(one.get(name), value, name) for name, value in other.items()}}
    if isinstance(other, list) and len(one) == len(other):
        return [_added(*pair) for pair in zip(one, other, strict=True)]
    if isinstance(other, bool) or not isinstance(other, int | float):
        return one
    return max(one, other) if key.endswith(("_s_max", "_mean")) else one + other
