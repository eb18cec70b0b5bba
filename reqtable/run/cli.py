"""The command line: commands that serve, that print what would be served, and that ask a running server.

Exit codes: 0 fine, 2 usage, 3 a server that could not be asked, 78 configuration (sysexits(3)), 1 anything else. An
error is one line that names the thing and the mend. If the user's code has raised it, the traceback follows, without
our frames.
"""

from __future__ import annotations

import os
import sys

import click

from reqtable.handlers.lean import lean
from reqtable.run.commands.check import check_command
from reqtable.run.commands.completion import completion_command
from reqtable.run.commands.http import http_command
from reqtable.run.commands.inspect import config_command, states_command
from reqtable.run.commands.looking import stats_command, watch_command, workers_command
from reqtable.run.commands.new import new_command
from reqtable.run.commands.record import record_command
from reqtable.run.commands.restart import restart_command
from reqtable.run.commands.rows import kill_command, ps_command, show_command
from reqtable.run.commands.serve import serve_command
from reqtable.run.commands.steering import (
    drain_command,
    log_level_command,
    reload_command,
    set_command,
)
from reqtable.run.commands.talk import talk_command
from reqtable.run.commands.top import top_command
from reqtable.run.commands.wsgi import wsgi_command
from reqtable.server.operator import HANDOVER_VARIABLE
from reqtable.table.addresses import printable
from reqtable.table.errors import ConfigurationError, HandlerError
from reqtable.table.tracebacks import account_of, shown, trim

USAGE, CONFIGURATION, FAILURE = 2, 78, 1
FORM = "C module" if lean else "pure Python"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="reqtable", message=f"%(prog)s %(version)s ({FORM})")
def cli() -> None:
    """Serve requests from an explicit table, on one thread. Look at the requests of a running server, and end them."""


for command in (
    serve_command,
    http_command,
    wsgi_command,
    check_command,
    talk_command,
    new_command,
    states_command,
    config_command,
    ps_command,
    show_command,
    record_command,
    kill_command,
    top_command,
    stats_command,
    workers_command,
    drain_command,
    reload_command,
    restart_command,
    set_command,
    log_level_command,
    watch_command,
    completion_command,
):
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Run the `reqtable` command, and exit."""
    sys.exit(_run(arguments))


def _run(arguments: list[str] | None) -> int:
    """Run the command. Returns its exit code."""
    try:
        return int(cli.main(arguments, prog_name="reqtable", standalone_mode=False) or 0)
    except click.UsageError as error:
        if not sys.argv[1:] and arguments is None:
            click.echo(cli.get_help(click.Context(cli, info_name="reqtable")))
            return USAGE
        _complain(error.format_message(), cause=error.__context__)
        return USAGE
    except click.ClickException as error:
        _complain(error.format_message())
        return error.exit_code
    except click.Abort:
        return FAILURE
    except BrokenPipeError:  # the reader of the output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except ConfigurationError as error:
        _complain(str(error), cause=error.__cause__)
        return CONFIGURATION
    except Exception as error:
        if not trim(error):
            if not isinstance(error, OSError):
                raise
            _complain(_account_of_os(error))
            return FAILURE
        _complain(account_of(error), cause=error)  # such as that of an `on_start`
        return FAILURE


def _account_of_os(error: OSError) -> str:
    """Return what the system has refused, after the file if it was about one."""
    said = error.strerror or str(error)
    return said if error.filename is None else f"{printable(error.filename)}: {said.lower()}"


def _complain(message: str, cause: BaseException | None = None) -> None:
    """Print one line and, if the user's code raised `cause`, the traceback from there. A broken rule needs none."""
    line = " ".join(message.split())
    click.echo(f"reqtable: {line}", err=True)
    if cause is not None and not isinstance(cause, HandlerError | ConfigurationError | SystemExit) and trim(cause):
        click.echo(shown(cause), err=True)
    if HANDOVER_VARIABLE in os.environ:  # this process was to take the place of another one
        from reqtable.run.inherited import refuse_to_begin  # only here, because it needs msgspec

        refuse_to_begin(line)
