"""Says which calls of requests wait for a thread, which run, and which run though their requests have ended."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from reqtable.dispatch.calls import Calls, CallUnderway
from reqtable.table.states import State
from reqtable.table.table import Entry


def calls_of(entry: Entry) -> list[CallUnderway]:
    """Return the calls that a request waits for, also if a thread has the rest of the request."""
    known = known_calls(entry)
    if known is None:
        return []
    return known.handed_off(entry) if entry.state is State.DELEGATED else known.of(entry)


def known_calls(entry: Entry) -> Calls | None:
    """Return what knows the calls of a request; None: nothing does."""
    policy: Any = entry.policy
    host = getattr(policy, "host", None)
    return None if host is None else host.executors.calls


def with_queue(row: Mapping[str, Any], entry: Entry) -> Mapping[str, Any]:
    """Return the row, or one that says that a call of the request waits for a thread, a child or a process."""
    if entry.state in (State.OFFLOADED, State.WAITING):
        known = known_calls(entry)
        if known is not None and any(each.phase == "queued" for each in known.of(entry)):
            return {**row, "waits_for": f"{row['waits_for']}, queued"}
    return row


def shown_calls(entry: Entry, now: float) -> list[dict[str, Any]]:
    """Return the calls that a request waits for, as plain data."""
    return [
        {
            "call": repr(each.want),
            "on": each.on,
            "phase": each.phase,
            "age_s": now - each.began_at,
            "asked_by": str(each.want.place),
        }
        for each in calls_of(entry)
    ]


def goes_on(call: CallUnderway) -> bool:
    """Return whether a call goes on if its request ends: a child is killed, and a queued call never runs."""
    return call.on != "fork" and call.phase == "running"


def counts_of(server: Any) -> dict[str, dict[str, Any]]:
    """Return how many calls of a server are in each phase, by the executor. A former configuration's calls count, too.

    `most` is how many can run at a time; None if no limit of the server says so.
    """
    sums: dict[str, dict[str, Any]] = {}
    for policies in (server._policies, *server._former):
        for on, counts in policies.executors.calls.counts().items():
            known = sums.get(on)
            sums[on] = counts if known is None else {name: _sum(known[name], counts[name]) for name in counts}
    return sums


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other


def threads_of(known: Iterable[Calls]) -> dict[str, int] | None:
    """Return how many threads for calls there can be, and how many are busy; None if there are none."""
    counts = [each.counts()["thread"] for each in known if "thread" in each.counts()]
    if not counts:
        return None
    return {
        "busy": sum((each["running"] or 0) + (each["given_up"] or 0) for each in counts),
        "most": sum(each["most"] or 0 for each in counts),
    }
