"""The command `python -m reqtable.compat run`. Exit code: 2 for a usage error, otherwise that of the program."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from reqtable.compat import environment
from reqtable.dispatch import policy_names
from reqtable.run.cli import USAGE


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Run programs that use `socketserver` on reqtable."""


@cli.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    options_metavar="[--dispatch POLICY]",
)
@click.option("--dispatch", type=click.Choice(policy_names()), help="The dispatch policy of all its servers.")
@click.argument("program", nargs=-1, type=click.UNPROCESSED, metavar="SCRIPT|-m MODULE [ARGUMENT]...")
def run(dispatch: str | None, program: Sequence[str]) -> None:
    """Run a Python program with `socketserver` replaced. The arguments are those that would follow `python`."""
    if sys.flags.ignore_environment:
        raise click.UsageError("python -I and -E ignore PYTHONPATH, which replaces socketserver: leave them out")
    if not program or tuple(program) == ("-m",):
        raise click.UsageError("say what to run, as in: run server.py, or: run -m http.server 8000")
    if program[0].startswith("-") and program[0] not in ("-m", "-c", "-"):
        raise click.UsageError(
            f"{program[0]}: give python's options before -m: python {program[0]} -m reqtable.compat run …"
        )
    flags = _given_to_python()
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *flags, *program], environment(dispatch))


def _given_to_python() -> list[str]:
    """Return the options of this interpreter: everything before `-m reqtable.compat`."""
    options = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]
    if options[-1:] == ["reqtable.compat"]:
        options.pop()
    last = options.pop().partition("m")[0]  # as in -m, -um, -mreqtable.compat
    return options if last == "-" else [*options, last]


def main() -> None:
    """Run the command. A usage error is printed as one line."""
    try:
        cli.main(prog_name="python -m reqtable.compat", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(USAGE)
    except click.UsageError as error:
        click.echo(f"reqtable.compat: {' '.join(error.format_message().split())}", err=True)
        sys.exit(USAGE)


if __name__ == "__main__":
    main()
