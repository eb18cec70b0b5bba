"""The keys of `reqtable top` change its model here."""

from __future__ import annotations

import shlex
from collections.abc import Callable

from reqtable.control.query import ORDERS, ROW_ORDERS, Query, QueryError
from reqtable.run.top.model import Act, Model, Page, Prompt, Question, key_of
from reqtable.table.addresses import printable

PROMPT_MAX = 200  # characters

SORT_KEYS = {"a": "age", "e": "idle", "m": "mem", "n": "in", "o": "out", "t": "steps", "#": "id"}
LOOK = Act("look")


def press(model: Model, key: str) -> Act | None:
    """Do what a key means. Returns what a server must be asked for, if anything."""
    if key == "ctrl-c":
        return Act("quit")
    if model.prompt is not None:
        return _type(model, model.prompt, key)
    if model.question is not None:
        question, model.question = model.question, None
        return question.act if key in ("y", "Y") else None
    model.message = ""
    if model.page is Page.HELP:
        model.page = Page.ROWS if model.opened is None else Page.DETAIL
        return None
    keys = _ON_DETAIL if model.page is Page.DETAIL else _ON_ROWS
    return keys[key](model) if key in keys else None


def _type(model: Model, prompt: Prompt, key: str) -> Act | None:
    if key == "enter":
        model.prompt = None
        return prompt.done(prompt.text)
    if key == "escape":
        model.prompt = None
    elif key == "backspace":
        prompt.text = prompt.text[:-1]
    elif key == "ctrl-u":
        prompt.text = ""
    elif len(key) == 1 and key.isprintable() and len(prompt.text) < PROMPT_MAX:
        prompt.text += key
    return None


# -- which rows -------------------------------------------------------------------------------------------------------


def _sort_by(model: Model, order: str) -> Act:
    model.sort = order
    model.rows.sort(key=ROW_ORDERS[order])  # until the answer comes
    model.go_to_top()
    return LOOK


def _next_sort(model: Model) -> Act:
    orders = list(ORDERS)
    return _sort_by(model, orders[(orders.index(model.sort) + 1) % len(orders)])


def _ask_filter(model: Model) -> None:
    text = " ".join(f"{name}={shlex.quote(value)}" for name, value in model.filters.items())
    model.prompt = Prompt("filter, such as older=40 handler=Notes: ", text, lambda text: _filter(model, text))


def _filter(model: Model, text: str) -> Act | None:
    try:
        model.filters = filters_of(text)
    except QueryError as error:
        model.message = printable(error)
        return None
    model.go_to_top()
    return LOOK


def filters_of(text: str) -> dict[str, str]:
    """Return the filters in a text such as `older=40 handler=Notes`. Raises QueryError."""
    try:
        words = shlex.split(text)
    except ValueError:
        raise QueryError(f"{text}: a quotation mark is missing") from None
    found = {}
    for word in words:
        name, separator, value = word.partition("=")
        if not separator or name in ("sort", "limit"):
            raise QueryError(f"{word}: write a filter as NAME=VALUE; / searches for a text")
        found[name] = value.upper() if name == "state" else value
    Query.of({name: value for name, value in found.items() if name != "control"})
    return found


def _ask_search(model: Model) -> None:
    model.prompt = Prompt("search: ", model.search, lambda text: _search(model, text))


def _search(model: Model, text: str) -> Act:
    model.search = text.strip()
    model.show(model.rows)  # until the answer comes
    model.go_to_top()
    return LOOK


def _drop_search(model: Model) -> Act | None:
    return _search(model, "") if model.search else None


def _next_part(model: Model) -> Act | None:
    """Choose the next server or worker, and all of them after the last one."""
    parts = model.choices()
    chosen = (model.control or "", model.worker or 0)
    if not parts and not any(chosen):
        model.message = "the server has only one process"
        return None
    control, worker = next((each for each in parts if (each[0] or "", each[1] or 0) > chosen), (None, None))
    for name, value in (("control", control), ("worker", worker)):
        model.filters.pop(name, None)
        if value is not None:
            model.filters[name] = str(value)
    model.go_to_top()
    return LOOK


def _pause(model: Model) -> None:
    model.is_paused = not model.is_paused


# -- moving -----------------------------------------------------------------------------------------------------------


def _moving(by: Callable[[Model], int]) -> Callable[[Model], Act | None]:
    def move(model: Model) -> Act | None:
        model.move(by(model))
        return LOOK if model.lacks_rows else None

    return move


def _scrolling(by: Callable[[Model], int]) -> Callable[[Model], None]:
    def scroll(model: Model) -> None:
        model.scroll = max(0, model.scroll + by(model))

    return scroll


def _open(model: Model) -> Act | None:
    row = model.selected
    if row is None:
        return None
    model.page, model.opened, model.detail, model.has_ended, model.scroll = Page.DETAIL, key_of(row), row, False, 0
    return LOOK


def _back(model: Model) -> Act:
    model.page, model.opened, model.detail = Page.ROWS, None, None
    return LOOK


def _help(model: Model) -> None:
    model.page = Page.HELP


# -- actions ----------------------------------------------------------------------------------------------------------


def _kill(model: Model) -> None:
    """Ask whether to end the selected request, or the one on the detail page."""
    row = model.detail if model.page is Page.DETAIL else model.selected
    if row is not None:
        at = "" if row["handler_state"] is None else f" at {printable(row['handler_state'])}"
        whose = f"{printable(row['peer'])}, {printable(row['handler'])}{at}"
        control, id = key_of(row)
        of_server = "" if control is None else f" of {printable(control)}"
        model.question = Question(f"End request {id}{of_server} ({whose})?", Act("cancel", id, control, row["peer"]))


def _drain(model: Model) -> None:
    """Ask whether to drain the chosen worker, or the server."""
    control, worker = model.control, model.worker
    name = "" if control is None else f" {printable(control)}"
    if model.controls() and control is None:
        model.message = "there are several servers: choose one with w"
    elif worker is not None and len(model.worker_pids(control)) > 1:
        text = f"Drain worker {worker}{name and ' of' + name}? Another one takes its place."
        model.question = Question(text, Act("drain", worker, control))
    else:
        text = f"Drain the server{name}? It ends when its requests are done."
        model.question = Question(text, Act("drain", None, control))


_STEPS: dict[str, Callable[[Model], int]] = {
    "up": lambda _: -1,
    "k": lambda _: -1,
    "down": lambda _: 1,
    "j": lambda _: 1,
    "page-up": lambda model: -model.height,
    "page-down": lambda model: model.height,
    "home": lambda model: -model.place - model.scroll,
    "g": lambda model: -model.place - model.scroll,
}
_EVERYWHERE: dict[str, Callable[[Model], Act | None]] = {
    "?": _help,
    "h": _help,
    "p": _pause,
    "K": _kill,
    "D": _drain,
}
_ON_DETAIL: dict[str, Callable[[Model], Act | None]] = {
    **_EVERYWHERE,
    **{key: _scrolling(by) for key, by in _STEPS.items()},
    "q": _back,
    "escape": _back,
    "enter": _back,
}


def _sorting(order: str) -> Callable[[Model], Act]:
    return lambda model: _sort_by(model, order)


_ON_ROWS: dict[str, Callable[[Model], Act | None]] = {
    **_EVERYWHERE,
    **{key: _moving(by) for key, by in _STEPS.items()},
    **{key: _sorting(order) for key, order in SORT_KEYS.items()},
    "q": lambda _: Act("quit"),
    "escape": _drop_search,
    "enter": _open,
    "s": _next_sort,
    "f": _ask_filter,
    "/": _ask_search,
    "w": _next_part,
}
