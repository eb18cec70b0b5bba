"""`reqtable states` and `reqtable config`: they serve nothing, and print what would be served."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

from reqtable.config import DEFAULT, Config, chosen_dispatch, effective
from reqtable.dispatch import check_policy, policy_names
from reqtable.dispatch.policies.greenlet import policy_for_blocking
from reqtable.handlers.declaration import StateInfo
from reqtable.handlers.state import StateRequestHandler
from reqtable.run.commands.handler_class import HandlerClass
from reqtable.run.commands.serving import CONFIG_OPTION, WORKERS_OPTION
from reqtable.table.snapshot import handler_name, unwrapped


@click.command("states", short_help="The states of a handler, with their waits and successors.")
@click.argument("handler", type=HandlerClass())
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "mermaid", "dot", "json"]),
    default="table",
    show_default=True,
    help="dot: a graph for Graphviz; mermaid: a diagram for Markdown.",
)
def states_command(handler: Any, form: str) -> None:
    """Print the states of HANDLER: the want of each state, its timeout, and the states that may follow."""
    handler = unwrapped(handler)
    if not issubclass(handler, StateRequestHandler):
        raise click.UsageError(f"{handler_name(handler)} is not a state machine: derive it from StateRequestHandler")
    states = handler.states()
    if not states:
        raise click.UsageError(f"{handler_name(handler)} declares no state: put @state(line()) before a method")
    click.echo({"table": _as_table, "mermaid": _as_mermaid, "dot": as_dot, "json": _as_json}[form](states))


def _as_table(states: list[StateInfo]) -> str:
    rows = [("  state", "waits for", "timeout", "then", "")]
    for each in states:
        rows.append(
            (
                ("> " if each.initial else "  ") + each.name,
                each.want,
                "-" if each.timeout is None else f"{each.timeout:g} s",
                ", ".join(name or "done" for name in each.successors),
                each.doc,
            )
        )
    return _aligned(rows)


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Return the rows as lines, with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _as_mermaid(states: list[StateInfo]) -> str:
    lines = ["stateDiagram-v2"]
    for each in states:
        if each.initial:
            lines.append(f"    [*] --> {each.name}")
        lines.append(f"    {each.name}: {each.name} · {each.want}")
        lines += [f"    {each.name} --> {name or '[*]'}" for name in each.successors]
    return "\n".join(lines)


def as_dot(states: list[StateInfo]) -> str:
    """Return states as a graph in the language of Graphviz."""
    lines = ["digraph states {", "    node [shape=box, style=rounded, fontname=sans];"]
    lines.append('    "begin" [shape=point];')
    if any(None in each.successors for each in states):
        lines.append('    "end" [shape=doublecircle, label="", width=0.12];')
    for each in states:
        own = _node(each.name)
        if each.initial:
            lines.append(f'    "begin" -> {own};')
        lines.append(f"    {own} [label={_quoted(each.name, each.want)}];")
        lines += [f"    {own} -> {_node(name)};" for name in each.successors]
    return "\n".join([*lines, "}"])


def _node(name: str | None) -> str:
    """Return the node of a state, or that of the end. No state has the name of another node: all begin with "state"."""
    return '"end"' if name is None else f'"state {name}"'


def _quoted(*lines: str) -> str:
    """Return the lines as a string of Graphviz."""
    return '"' + "\\n".join(each.replace("\\", "\\\\").replace('"', '\\"') for each in lines) + '"'


def _as_json(states: list[StateInfo]) -> str:
    return json.dumps([each._asdict() for each in states], indent=2)


@click.command("config", short_help="The value of each key of the configuration, and its source.")
@click.option("--dispatch", type=click.Choice(policy_names()), help="As for `reqtable serve`.")
@WORKERS_OPTION
@CONFIG_OPTION
def config_command(dispatch: str | None, workers: int | None, config: str | None) -> None:
    """Print the configuration that `reqtable serve` would use: each value and its source."""

    loaded = Config.load(config, dispatch=dispatch, workers=workers)
    check_policy(*chosen_dispatch(None, loaded, "inline"))
    rows = [(key, "-" if value is None else json.dumps(value), origin) for key, value, origin in effective(loaded)]
    if rows[0][2] == DEFAULT:
        rows[0] = (*rows[0][:2], f'{DEFAULT}; for a blocking handler "{policy_for_blocking()}"')
    click.echo(_aligned(rows))
