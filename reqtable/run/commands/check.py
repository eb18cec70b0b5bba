"""`reqtable check`: what is wrong with handlers, before they are served."""

from __future__ import annotations

import json
import os
import sys
from contextlib import redirect_stdout

import click

from reqtable.handlers.checked import findings
from reqtable.handlers.finding import Finding, finding_in
from reqtable.handlers.source import Sources
from reqtable.run.commands.handler_class import HandlerClass

FOUND = 1  # the exit code if there are findings


@click.command("check")
@click.argument("handlers", nargs=-1, required=True, metavar="HANDLER...")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON: one list of objects.")
@click.pass_context
def check_command(ctx: click.Context, handlers: tuple[str, ...], as_json: bool) -> int:
    """Look for mistakes in each HANDLER without serving it. The exit code is 1 if there are any.

    HANDLER is a handler class as module:Class or path/to/file.py:Class.
    """
    sources = Sources()
    found = list(dict.fromkeys(each for handler in handlers for each in _found(handler, ctx, sources)))
    if as_json:
        click.echo(json.dumps([each._asdict() for each in found], indent=2))
    else:
        for each in found:
            place = each.place.removeprefix(f"{os.getcwd()}{os.sep}")
            click.echo(f"{place}: {each.text}: {each.mend} [{each.kind}]")
        if not found:
            click.echo(f"{', '.join(handlers)}: no findings")
    return FOUND if found else 0


def _found(handler: str, ctx: click.Context, sources: Sources) -> list[Finding]:
    """Return the findings about one handler; if its module can't be imported because of a finding, that one."""
    try:
        with redirect_stdout(sys.stderr):  # what the module prints is no finding
            handler_class = HandlerClass().convert(handler, ctx.command.params[0], ctx)
        return findings(handler_class, sources)
    except click.BadParameter as error:
        found = finding_in(error.__context__)
        if found is None:
            raise
        return [found]
