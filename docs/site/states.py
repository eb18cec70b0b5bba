"""The states of a request, from `reqtable.table.states`: their texts, their transitions, and a diagram of these."""

from __future__ import annotations

from collections import defaultdict
from enum import Enum

from docs.site.drawing import drawn
from docs.site.texts import table, texts_of
from reqtable.table.states import INTEREST, PEER_END, READ, RESET, TRANSITIONS, WRITE, Ending, Event, State

_POLLED = {READ: "input", WRITE: "room for output", RESET: "a reset", PEER_END: "the peer's end of file"}
# The diagram would be a thicket with these: nearly every state has them.
_EVERYWHERE = {Event.CANCELLED, Event.LOST, Event.FROZEN}


def states() -> str:
    """Return the table of the states."""
    texts = texts_of(State)
    rows = ((f"`{each.value}`", f"`{each.name}`", texts[each.name], _interest(each)) for each in State)
    return table(("letter", "state", "meaning", "polled for"), rows)


def events() -> str:
    """Return the table of the events."""
    return _table_of(Event, "event")


def endings() -> str:
    """Return the table of the endings."""
    return _table_of(Ending, "ending")


def transitions() -> str:
    """Return the table of the transitions."""
    rows = (
        (f"`{state.name}`", "<br>".join(f"{event.value} → `{following.name}`" for event, following in by_event.items()))
        for state, by_event in TRANSITIONS.items()
    )
    return table(("state", "event → next state"), rows)


def transition_diagram() -> str:
    """Return a drawing of the transitions, without those that nearly every state has."""
    events_of = defaultdict(list)
    for state, by_event in TRANSITIONS.items():
        for event, following in by_event.items():
            if event not in _EVERYWHERE:
                events_of[state.name, following.name].append(event.value)
    lines = ["digraph transitions {", "rankdir=LR; nodesep=0.3; ranksep=0.5;"]
    lines.append("node [shape=box, style=rounded, fontname=sans]; edge [fontname=sans, fontsize=11];")
    for (state, following), named in events_of.items():
        label = "\\n".join(named)
        lines.append(f'{state} -> {following} [label="{label}"];')
    return drawn("\n".join([*lines, "}"]), "The states of a request and their transitions")


def _interest(state: State) -> str:
    """Return what the loop polls the socket of a request in that state for."""
    return " and ".join(text for bit, text in _POLLED.items() if INTEREST[state] & bit) or "-"


def _table_of(kind: type[Enum], name: str) -> str:
    texts = texts_of(kind)
    return table((name, "meaning"), ((f"`{each.value}`", texts[each.name]) for each in kind))
