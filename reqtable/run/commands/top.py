"""`reqtable top`: a live screen of running servers, or frames of text in a pipe."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import click

from reqtable.run.commands.asking import control_option, json_option, print_json
from reqtable.run.commands.finding import CouldNotAsk
from reqtable.run.commands.servers import Servers
from reqtable.run.top.model import Model, Sample, Unanswered

_IN_PIPE = (132, 50)  # columns and lines, unless COLUMNS and LINES say otherwise
_AROUND_ROWS = 10  # lines


@click.command("top", short_help="A live screen of requests, rates and the loop.")
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1),
    default=1.0,
    metavar="S",
    help="Ask every S seconds; by default every second.",
)
@click.option("--once", is_flag=True, help="Print one frame, with the rates of S seconds, and end.")
@control_option(
    multiple=True,
    help="A server: its control socket, its process, or :PORT of a bind; repeatable. By default all your servers that "
    "run.",
)
@json_option
def top_command(control: tuple[str, ...], as_json: bool, interval: float, once: bool) -> int:
    """Show the requests of running servers on a live screen: rates, the loop, workers, states, rows.

    Several servers share one table. The column `control` has the name of each one's socket.

    Press ? for the keys. In a pipe, and with --once, frames of text are printed. With --json, each frame is one line:
    the statistics, and the rows.

    The extra reqtable[top] has what the screen needs.
    """
    return (_print_json if as_json else _show)(control, interval, once)


def _show(control: tuple[str, ...], interval: float, once: bool) -> int:
    try:
        from reqtable.run.top.screen import Screen
        from reqtable.run.top.view import plain_frame
    except ModuleNotFoundError:
        raise click.ClickException("reqtable top needs rich: pip install 'reqtable[top]'") from None

    model = Model()
    with _asking(control) as servers:
        if not once and Screen.is_possible():
            model.take(_first(servers, model))  # a server that is not there is told of before the screen is taken
            return Screen(model, servers.look, servers.act, interval).run()
        width, height = shutil.get_terminal_size(_IN_PIPE)
        model.resize(max(1, height - _AROUND_ROWS))
        with suppress(KeyboardInterrupt):
            if once:  # rates need two looks
                model.take(_first(servers, model))
                time.sleep(interval)
            for _ in _frames(servers, model, None if once else interval):
                click.echo("\n".join(plain_frame(model, width, time.time())) + ("" if once else "\n"))
                sys.stdout.flush()
    return 0


def _print_json(control: tuple[str, ...], interval: float, once: bool) -> int:
    model = Model(height=10_000)
    with _asking(control) as servers, suppress(KeyboardInterrupt):
        for sample in _frames(servers, model, None if once else interval):
            if sample is not None:
                print_json({"stats": sample.stats, "requests": sample.rows})
                sys.stdout.flush()
    return 0


@contextmanager
def _asking(control: tuple[str, ...]) -> Iterator[Servers]:
    """Yield the servers. At the end, say which workers their answers lacked."""
    servers = Servers(control)
    try:
        yield servers
    finally:
        servers.tell_missing()


def _frames(servers: Servers, model: Model, interval: float | None) -> Iterator[Sample | None]:
    """Yield each answer after the model has taken it; None if no server answers any more.

    Without an interval, there is only one. Raises ClickException if no server answers at first.
    """
    sample: Sample | None = _first(servers, model)
    while True:
        if sample is not None:
            model.take(sample)
        yield sample
        if interval is None:
            return
        time.sleep(interval)
        try:
            sample = servers.look(model.wanted())
        except Unanswered as error:
            sample = None
            model.fail(str(error))


def _first(servers: Servers, model: Model) -> Sample:
    """Return the first answer. Raises ClickException if there is none."""
    try:
        return servers.look(model.wanted())
    except Unanswered as error:
        raise CouldNotAsk(str(error)) from None
