"""The commands and their options, from click."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import click

from docs.site.texts import table
from reqtable.compat.__main__ import cli as compat_cli
from reqtable.run.cli import cli


def commands() -> str:
    """Return a list of the commands, and a part for each command."""
    found = [*commands_of(cli, "reqtable"), *commands_of(compat_cli, "python -m reqtable.compat")]
    rows = ((f"[`{name}`](#{anchor(name)})", each.get_short_help_str(limit=200)) for name, each in found)
    return "\n\n".join([table(("command", "what it does"), rows), *(_part(name, each) for name, each in found)])


def commands_of(group: click.Group, program: str) -> Iterator[tuple[str, click.Command]]:
    """Yield the commands of a program, each with its whole name."""
    for each in group.commands.values():
        yield f"{program} {each.name}", each


def anchor(name: str) -> str:
    """Return the anchor of a command."""
    return name.removeprefix("reqtable ").replace(" ", "-")


def _part(name: str, command: click.Command) -> str:
    context = click.Context(command, info_name=name, **command.context_settings)
    usage = f"{name} {' '.join(command.collect_usage_pieces(context))}"
    records = [record for each in command.get_params(context) if (record := each.get_help_record(context))]
    options = "\n\n".join(f"`{option}`\n:   {_escaped(text)}" for option, text in records if text)
    return f"## {name} {{ #{anchor(name)} }}\n\n```\n{usage}\n```\n\n{_help(command)}\n\n{options}"


def _help(command: click.Command) -> str:
    """Return the text of a command. What stands below a \\b is shown as it is."""
    parts = inspect.cleandoc(command.help or "").partition("\f")[0].split("\n\n")
    return "\n\n".join(f"```\n{each[2:]}\n```" if each.startswith("\b\n") else _escaped(each) for each in parts)


def _escaped(text: str) -> str:
    """Return plain text as Markdown: no character but a backtick means anything."""
    return re.sub(r"([*_<\[|])(?=[^`]*(?:`[^`]*`[^`]*)*$)", r"\\\1", text)
