"""Draws the model of `reqtable top` as lines of styled text, which fill a screen of a given size.

Text of a client is made printable, and never parsed as markup: `Text` takes it as it is.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.cells import chop_cells
from rich.text import Text

from reqtable.run.commands import shown
from reqtable.run.commands.detail import detail_lines
from reqtable.run.commands.looking import calls_text
from reqtable.run.commands.restart import news
from reqtable.run.commands.rows import COLUMNS, NOT_ALWAYS, USUAL
from reqtable.run.commands.shown import Column
from reqtable.run.commands.stuck import stack_lines
from reqtable.run.top.controls import SORT_KEYS
from reqtable.run.top.figures import Rates
from reqtable.run.top.model import SEARCH_ROWS, Model, Page, Sample, own_stats
from reqtable.table.states import State

_STATE_STYLES = {
    State.OPENING: "magenta",
    State.CONNECTING: "magenta",
    State.READING: "cyan",
    State.WAITING: "blue",
    State.READY: "green",
    State.RUNNING: "bold green",
    State.WRITING: "yellow",
    State.SLEEPING: "white",
    State.OFFLOADED: "red",
    State.DELEGATED: "bright_red",
    State.LINGERING: "bright_black",
    State.MOVING: "bright_blue",
}
_WIDEST = {"peer": 28, "handler": 16, "handler_state": 16, "path": 32, "waits_for": 200}  # columns of a terminal
_LONGEST = 2000  # characters of a line on the page of a request
_CUT_FIRST = 4  # characters for each column: some take no column, but a client may not send any number of them

_KEYS_ON_ROWS = "? help  s sort  f filter  / search  Enter open  K kill  D drain  p pause  q quit"
_KEYS_ON_DETAIL = "q back  j down  k up  K kill  D drain  p pause  ? help"
_HELP = [
    ("s", "sort by the next of " + ", ".join(SORT_KEYS.values())),
    (" ".join(SORT_KEYS), "sort by one of these; the largest first, but for id"),
    ("f", "filter: NAME=VALUE …, such as older=40 handler=Notes state=R"),
    ("", "names: state handler handler_state peer path policy older idle"),
    ("/", f"search for a text in the first {SEARCH_ROWS:,} rows; Esc shows all again"),
    ("w", "show the next server or worker only, and all after the last one"),
    ("up k down j", "select a row; also page-up, page-down, home"),
    ("Enter", "open the selected request: its fields, input, stack"),
    ("K", "end the selected request (asks)"),
    ("D", "drain the server, or the chosen worker (asks)"),
    ("p", "pause: do not ask the server, until the next p"),
    ("q", "quit; on the page of a request: back"),
    ("in, out", "bytes in a second, of requests that have ended"),
    ("busy", "the share of the time in which the loop works"),
    ("late", "how late timers were since the last look, on average"),
]


def frame(model: Model, width: int, height: int, now: float) -> list[Text]:
    """Return the lines of a screen: exactly `height`, none wider than `width`. Tells the model how many rows fit."""
    most = 1 if model.page is Page.DETAIL else max(1, height - 5)
    header = _header(model, width, now)[:most]
    room = max(1, height - len(header) - 2)
    model.resize(room)
    if model.page is Page.HELP:
        body = [Text(line) for line in shown.pairs(_HELP)]
    elif model.page is Page.DETAIL:
        body = _detail(model, width, room + 1)
    else:
        body = _body(model)
    lines = [*header, *body][: height - 1]
    lines += [Text()] * (height - 1 - len(lines))
    return [_fitted(line, width) for line in [*lines, _footer(model)]]


def plain_frame(model: Model, width: int, now: float) -> list[str]:
    """Return the lines of a frame for a pipe: as many as there are, without styles and without keys."""
    lines = [*_header(model, width, now), *_body(model)]
    return [_fitted(line, width).plain.rstrip() for line in lines]


def _fitted(line: Text, width: int) -> Text:
    fitted = line.copy()
    fitted.truncate(width, overflow="ellipsis")
    fitted.no_wrap = True
    return fitted


# -- the header -------------------------------------------------------------------------------------------------------


def _header(model: Model, width: int, now: float) -> list[Text]:
    stats = model.stats()
    lines = [_title(model, now), _requests(model, stats), _flow(model.rates()), _loop(model, stats)]
    lines += _calls(stats)
    if model.sample is not None and "workers" in model.sample.stats:
        lines.append(_workers(model, width))
    if model.sample is not None:
        lines += _restarts(model.sample)
    return [*lines, *_state_bar(stats.get("states", {}), width), _choice(model)]


def _title(model: Model, now: float) -> Text:
    line = Text("reqtable top  ", style="bold")
    line.append(_names(model.sample))
    for name, problem in model.sample.problems.items() if model.sample is not None else ():
        line.append(f"  {shown.text(name)}: {shown.text(problem)}", style="bold red")
    line.append(time.strftime("  %H:%M:%S", time.localtime(now)), style="bright_black")
    if model.stats().get("is_draining"):
        line.append("  DRAINING", style="bold yellow")
    if model.is_paused:
        line.append("  PAUSED", style="bold yellow")
    if model.problem:
        return Text("reqtable top  ", style="bold").append(shown.text(model.problem), style="bold red")
    return line


def _names(sample: Sample | None) -> str:
    """Return the handlers and addresses of the servers, after the name of each if there are several."""
    if sample is None:
        return ""
    found = []
    for name, stats in sample.servers.items() or [("", sample.stats)]:
        every = [f"{shown.text(each['handler'])} {shown.text(each['address'])}" for each in stats.get("servers", ())]
        found.append(" ".join([*([shown.text(name)] if name else []), ", ".join(every[:3])]))
    return "; ".join(found)


def _restarts(sample: Sample) -> Iterator[Text]:
    """Yield a line for each server whose restart is news."""
    for name, stats in sample.servers.items() or [("", sample.stats)]:
        if (said := news(stats)) is not None:
            has_failed = (stats["restart"] or {}).get("phase") == "failed"
            words = f"restart   {name and shown.text(name) + ': '}{said}"
            yield Text(words, style="bold red" if has_failed else "bold yellow")


def _requests(model: Model, stats: Mapping[str, Any]) -> Text:
    if not stats:
        return Text("requests  -")
    line = Text(f"requests  {stats['entries']}")
    among = "servers" if model.controls() and model.control is None else "workers"
    most = f", at most {stats['entries_max']}{f' in all {among}' if 'workers' in stats else ''}"
    return line.append(f"{most}   connections {stats['connections']}   buffers {shown.size(stats['buffered_bytes'])}")


def _calls(stats: Mapping[str, Any]) -> Iterator[Text]:
    """Yield a line for each server that has calls underway."""
    for each in stats.get("servers", ()):
        said = calls_text(each.get("calls") or {})
        if said != "-":
            is_full = any(counts["queued"] for counts in each["calls"].values())
            yield Text(f"calls     {shown.text(each['handler'])}: {said}", style="bold red" if is_full else "")


def _flow(rates: Rates | None) -> Text:
    if rates is None:
        return Text("a second  -")
    line = Text(f"a second  in {shown.size(round(rates.bytes_in))}  out {shown.size(round(rates.bytes_out))}")
    line.append(f"   accepted {_rate(rates.accepted)}   finished {_rate(sum(rates.finished.values()))}")
    for place, (ending, rate) in enumerate(sorted(rates.finished.items(), key=lambda item: -item[1])):
        line.append(", " if place else ": ")
        line.append(f"{ending} {_rate(rate)}", style="" if ending == "done" else "yellow")
    if rates.refused:
        line.append(f"   refused {_rate(rates.refused)}", style="bold red")
    return line


def _rate(value: float) -> str:
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def _loop(model: Model, stats: Mapping[str, Any]) -> Text:
    line = Text("loop      ")
    rates = model.rates()
    if rates is None or not stats:
        line.append("busy -   pass -   late -")
    else:
        count = len(own_stats(stats))
        line.append(f"busy {rates.busy / count:.0%}", style=_busy_style(rates.busy / count))
        line.append(f"   pass {_brief(rates.pass_s)}   late {_brief(rates.late_s)}")
    if stats:
        line.append(f", {shown.brief(stats['loop']['lag_s_max'])} at most")
    if model.sample is not None:
        line.append(f"   answer {shown.brief(model.sample.took_s)}", style="red" if model.sample.took_s > 1 else "")
    return line


def _brief(seconds: float | None) -> str:
    return "-" if seconds is None else shown.brief(seconds)


def _busy_style(share: float) -> str:
    return "bold red" if share > 0.9 else "yellow" if share > 0.6 else ""


def _workers(model: Model, width: int) -> Text:
    """Return a line with the stuck workers first, and as many of the others as there is room for."""
    assert model.sample is not None
    stuck = model.stuck()
    parts = [Text(f"{_worker(each)} STUCK {shown.age(each['heard_s'])}", style="bold red") for each in stuck]
    known = {_worker(each) for each in stuck}
    others = [own for own in own_stats(model.sample.stats) if _worker(own) not in known]
    for own in sorted(others, key=lambda own: -own["entries"]):
        rates = model.rates_of(own)
        busy = "" if rates is None else f" {rates.busy:.0%}"
        draining = " drains" if own["is_draining"] else ""
        style = "" if rates is None else _busy_style(rates.busy)
        if model.is_shown(own) and not (model.worker is None and model.control is None):
            style = "reverse"
        parts.append(Text(f"{_worker(own)}{busy} {own['entries']} req{draining}", style=style))
    line = Text("workers   ")
    for place, part in enumerate(parts):
        left = len(parts) - place
        if place and line.cell_len + part.cell_len + 12 > width and left > 1:
            return line.append(f", {left} more")
        line.append("" if not place else ", ").append_text(part)
    return line


def _worker(own: Mapping[str, Any]) -> str:
    """Return the number of a worker, after the name of its server if there are several."""
    return f"{shown.text(own['control'])} {own['worker']}" if "control" in own else str(own["worker"])


def _state_bar(counts: Mapping[str, int], width: int) -> list[Text]:
    """Return a bar in which each state has its share, drawn with its letter, and the counts."""
    states = [state for state in State if counts.get(state.name)]
    bar, legend = Text("["), Text("states    ")
    for state, cells in zip(states, shares([counts[state.name] for state in states], width - 2), strict=True):
        bar.append(state.value * cells, style=_STATE_STYLES.get(state, ""))
        legend.append(f"{state.value} {state.name.lower()} {counts[state.name]}  ", style=_STATE_STYLES.get(state, ""))
    bar.append(" " * (width - 1 - bar.cell_len) + "]")
    return [bar, legend if states else legend.append("-")]


def shares(counts: Sequence[int], cells: int) -> list[int]:
    """Divide cells by counts. Each count has one cell at least, while there are enough."""
    if not counts:
        return []
    given = [1] * len(counts)
    whole = sum(counts)
    for _ in range(cells - len(counts)):
        neediest = max(range(len(counts)), key=lambda place: counts[place] / whole * cells - given[place])
        given[neediest] += 1
    return given


def _choice(model: Model) -> Text:
    """Return which rows are shown, and in which order."""
    line = Text(f"sort {model.sort}", style="bold")
    for name, value in model.filters.items():
        line.append(f"   {name}={value}")
    if model.search:
        line.append(f'   with "{model.search}" of the first {SEARCH_ROWS:,}: {len(model.rows)}')
    if model.offset:
        line.append(f"   from row {model.offset + 1}")
    return line


# -- the rows ---------------------------------------------------------------------------------------------------------


def _bounded(column: Column, most: int) -> Column:
    def cell(row: Any) -> str:
        return shown.cut(column.cell(row)[: most * _CUT_FIRST], most)

    return Column(column.heading, cell, column.is_number)


_COLUMNS = {
    "control": _bounded(Column("control", lambda row: shown.text(row.get("control"))), 12),
    **{name: _bounded(COLUMNS[name], _WIDEST.get(name, 12)) for name in USUAL},
}
_OPTIONAL = [_COLUMNS[name] for name in ("control", *NOT_ALWAYS)]


def _body(model: Model) -> list[Text]:
    for each in model.stuck():
        if model.worker is not None and model.is_shown(each):
            title = Text(f"worker {model.worker} is stuck in", style="bold red")
            return [title, *(Text(f"  {shown.text(line)}") for line in stack_lines(each["stack"]))]
    rows = model.rows[model.offset : model.offset + model.height]
    heading, *lines = shown.table(list(_COLUMNS.values()), rows, _OPTIONAL)
    found = [Text(heading, style="bold underline")]
    for place, (row, cells) in enumerate(zip(rows, lines, strict=True), model.offset):
        style = "reverse" if place == model.place else "bright_black" if row["kind"] == "connection" else ""
        found.append(Text(cells, style=style))
    if not rows and model.sample is not None:
        found.append(Text("no request matches" if model.filters or model.search else "no request", style="italic"))
    return found


def _detail(model: Model, width: int, room: int) -> list[Text]:
    detail = model.detail or {}
    heading = Text(f"request {detail.get('id')}", style="bold")
    worker = (detail.get("control"), detail.get("worker"))
    if model.has_ended and any((each.get("control"), each["worker"]) == worker for each in model.stuck()):
        heading.append("  its worker does not answer", style="bold red")
    elif model.has_ended:
        heading.append("  has ended: this is how it was last seen", style="bold red")
    lines = [piece for line in _side_by_side(detail_lines(detail), width) for piece in chop_cells(line, width)]
    model.scroll = max(0, min(model.scroll, len(lines) - room + 1))
    return [heading, *(Text(line) for line in lines[model.scroll :])]


def _side_by_side(lines: Iterable[str], width: int) -> Iterator[str]:
    """Yield lines with two short neighbours in one line each, but for indented ones."""
    half, left = width // 2, ""
    for line in lines:
        is_short = shown.width_of(line[:_LONGEST]) < half and " " in line.strip()
        if left and is_short and line[0] != " ":
            yield left + " " * (half - shown.width_of(left)) + line
            left = ""
            continue
        if left:
            yield left
        left = ""
        if is_short and line[0] != " ":
            left = line
        else:
            yield line[:_LONGEST]
    if left:
        yield left


def _footer(model: Model) -> Text:
    if model.prompt is not None:
        return Text(model.prompt.label, style="bold").append(model.prompt.text, style="").append("_", style="blink")
    if model.question is not None:
        return Text(f"{model.question.text} y/n", style="bold yellow")
    if model.message:
        return Text(model.message, style="bold yellow")
    if model.page is Page.HELP:
        return Text("any key: back", style="bright_black")
    line = Text()
    for pair in (_KEYS_ON_ROWS if model.page is Page.ROWS else _KEYS_ON_DETAIL).split("  "):
        key, does = pair.split()
        line.append("  " if line else "").append(key, style="bold").append(f" {does}", style="bright_black")
    return line
