"""`reqtable top`: a live screen of a running server, or frames of text in a pipe."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

import click

from reqtable.control.workers import ANSWER_S
from reqtable.run.commands.asking import Asked, asks, print_json
from reqtable.run.top.model import Act, Model, Sample, Unanswered, Wanted
from reqtable.table.words import counted

_IN_PIPE = (132, 50)  # columns and lines, unless COLUMNS and LINES say otherwise
_AROUND_ROWS = 10  # lines
_NOT_FOUND = 404


@click.command("top", short_help="A live screen of requests, rates and the loop.")
@click.option("--interval", type=click.FloatRange(min=0.1), default=1.0, metavar="S", help="Ask every S seconds; 1.")
@click.option("--once", is_flag=True, help="Print one frame, with the rates of S seconds, and end.")
@asks
def top_command(server: Asked, as_json: bool, interval: float, once: bool) -> int:
    """Show the requests of a running server on a live screen: rates, the loop, workers, states, rows.

    Press ? for the keys. In a pipe, and with --once, frames of text are printed. With --json, each frame is one line:
    the statistics, and the rows.

    The extra reqtable[top] has what the screen needs.
    """
    if as_json:
        return _print_json(server, None if once else interval)
    try:
        from reqtable.run.top.screen import Screen
        from reqtable.run.top.view import plain_frame
    except ModuleNotFoundError:
        raise click.ClickException("reqtable top needs rich: pip install 'reqtable[top]'") from None

    model = Model()
    if not once and Screen.is_possible():
        model.take(_look(server, model.wanted()))  # a server that is not there is told of before the screen is taken
        return Screen(model, lambda wanted: _looked(server, wanted), lambda act: _acted(server, act), interval).run()
    width, height = shutil.get_terminal_size(_IN_PIPE)
    model.resize(max(1, height - _AROUND_ROWS))
    with suppress(KeyboardInterrupt):
        if once:  # rates need two looks
            model.take(_look(server, model.wanted()))
            time.sleep(interval)
        for _ in _frames(server, model, None if once else interval):
            click.echo("\n".join(plain_frame(model, width, time.time())) + ("" if once else "\n"))
            sys.stdout.flush()
    return 0


def _print_json(server: Asked, interval: float | None) -> int:
    model = Model(height=10_000)
    with suppress(KeyboardInterrupt):
        for sample in _frames(server, model, interval):
            if sample is not None:
                print_json({"stats": sample.stats, "requests": sample.rows})
                sys.stdout.flush()
    return 0


def _frames(server: Asked, model: Model, interval: float | None) -> Iterator[Sample | None]:
    """Yield each answer after the model has taken it; None if the server does not answer any more.

    Without an interval, there is only one. Raises ClickException if the server does not answer at first.
    """
    sample: Sample | None = _look(server, model.wanted())
    while True:
        if sample is not None:
            model.take(sample)
        yield sample
        if interval is None:
            return
        time.sleep(interval)
        try:
            sample = _looked(server, model.wanted())
        except Unanswered as error:
            sample = None
            model.fail(str(error))


def _looked(server: Asked, wanted: Wanted) -> Sample:
    """Return what the server answers. Raises Unanswered, and then looks for the server anew."""
    try:
        return _look(server, wanted)
    except click.ClickException as error:
        server.find_again()
        raise Unanswered(error.format_message()) from None


def _look(server: Asked, wanted: Wanted) -> Sample:
    """Ask for the statistics, and for the rows or one request. Only if a worker seems stuck, ask for the workers."""
    began = time.monotonic()
    stats = server.get("/v1/stats")
    at = time.monotonic()
    sample = Sample(wanted, at, at - began, stats)
    if wanted.id is None:
        rows = server.get("/v1/requests", sort=wanted.sort, limit=wanted.limit, **wanted.filters)
        sample = sample._replace(rows=rows)
    else:
        sample = sample._replace(detail=server.find(f"/v1/requests/{wanted.id}"))
    if time.monotonic() - began > ANSWER_S:
        sample = sample._replace(workers=server.get("/v1/workers"))
    return sample


def _acted(server: Asked, act: Act) -> str:
    """Have the server do what a key has asked for. Returns what was done. Raises Unanswered."""
    try:
        if act.verb == "cancel":
            answer = server.send("POST", "/v1/requests/cancel", {"ids": [act.of]}, also=_NOT_FOUND)
            return f"ended request {act.of}" if answer["cancelled"] else f"request {act.of} had ended already"
        answer = server.send("POST", "/v1/drain", {} if act.of is None else {"worker": act.of})
    except click.ClickException as error:
        raise Unanswered(error.format_message()) from None
    if act.of is not None:
        return f"worker {act.of} drains, and another one takes its place"
    return f"the server drains: {counted(answer['entries'], 'request')} in progress"
