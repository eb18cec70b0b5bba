"""`reqtable restart`, and how the commands show a restart as it goes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from math import inf
from typing import Any

import click

from reqtable.run.commands import shown
from reqtable.run.commands.asking import Asked, asks, print_json
from reqtable.run.commands.finding import CouldNotAsk
from reqtable.table.words import counted

_SILENT_S = 60.0  # how long the server may say nothing: a hook of the program may hold up its loop
_NEW_S = 60.0  # how long a restart that has worked is worth a line
_CLEAR = "\x1b[2K\r"  # erase the line, and go back to its beginning (ECMA-48)
_SAYS = {
    "starting": "begins",
    "rehearsing": "tries the requests",
    "rehearsed": "can go on with the requests",
    "listening": "begins to accept",
}


@click.command("restart", short_help="Move all requests to the next version of the program.")
@click.option(
    "--check", is_flag=True, help="Only find out whether a restart would work, and which requests could not move."
)
@asks
def restart_command(server: Asked, as_json: bool, check: bool) -> None:
    """Start the program anew beside the server, with its new code, and move all requests there. No client notices.

    Requests that can't move end in the old process, which then exits. If the new code can't start, or can't go on with
    the requests, the old process serves as before, and this command fails: the exit code is 1.

    On a terminal, a line shows the progress of the restart. Ctrl-C ends the command, not the restart.
    """
    server.tell_found()
    server.wait_at_most(_SILENT_S)
    limits = _drain_limits(server)  # now: the old process may be gone later
    found: dict[str, Any] = {}
    shows = not as_json and sys.stderr.isatty()
    try:
        for line in server.send_for_lines("POST", "/v1/restart", {"check": check}):
            found = json.loads(line)
            if shows:
                width = shown.terminal_width(sys.stderr) or 0
                click.echo(_CLEAR + shown.cut(restart_text(found), width - 1), nl=False, err=True)
    finally:
        if shows:
            click.echo(_CLEAR, nl=False, err=True)
    if not found:
        raise CouldNotAsk(f"{server.path}: the server has not said how the restart went")
    if as_json:
        print_json(found)
    elif found["problem"] is None:
        shown.print_lines(_outcome(found, check, *limits))
    if found["problem"] is not None:
        effect = "a restart would fail" if check else "not restarted, the old process goes on"
        raise click.ClickException(f"{effect}: {shown.text(found['problem'])}")


def _drain_limits(server: Asked) -> tuple[float, float]:
    """Return `drain_timeout_s` and `drain_idle_s` of the old process, by which the requests end that can't move."""
    return server.limit_s("drain_timeout_s"), server.limit_s("drain_idle_s")


def _outcome(found: Mapping[str, Any], is_check: bool, most_s: float, idle_s: float) -> Iterator[str]:
    immovable: dict[str, int] = found["immovable"]
    if is_check:
        yield f"the new code starts, and can go on with {counted(found['left'] - sum(immovable.values()), 'request')}"
    else:
        moved, took = counted(found["moved"], "request"), shown.brief(found["took_s"])
        frozen = f", frozen {shown.brief(found['longest_freeze_s'])} at most" if found["moved"] else ""
        yield f"{moved} moved to process {found['pid']} in {took}{frozen}"
    if immovable:
        ends, moves = ("a restart would end", "move") if is_check else ("the old process ends", "moves")
        limit = f"within {most_s:g} s (drain_timeout_s)" if most_s < inf else "when they are done"
        yield f"these can't move now; {ends} them {limit}, or {moves} them later:"
        yield from immovable_lines(immovable)
        if idle_s < most_s:
            sees = f"sees end of file after {idle_s:g} s of silence (drain_idle_s)"
            yield f"one that waits for input {sees}; a call goes on"
    if found["refused"]:
        yield "the new code has refused these, so they end in the old process:"
        yield from (f"  {shown.text(each)}" for each in found["refused"])


def immovable_lines(immovable: Mapping[str, int]) -> Iterator[str]:
    """Yield a line for each reason why requests can't move: how many, and why. The most frequent one comes first."""
    width = len(str(max(immovable.values(), default=0)))
    for why, count in sorted(immovable.items(), key=lambda each: -each[1]):
        yield f"  {count:>{width}}  {shown.text(why)}"


def restart_text(found: Mapping[str, Any]) -> str:
    """Return in one line how far a restart has come, as the process tells that gives its requests away."""
    phase, pid, moved = found["phase"], found["pid"], found["moved"]
    whole = moved + found["left"]
    if phase == "failed":
        what = "the check has failed" if found["check"] else "failed"
        return f"{what} {shown.age(found['ago_s'])} ago: {shown.text(found['problem'])}"
    if phase == "checked":
        return f"was only a check, {shown.age(found['ago_s'])} ago: the new code can go on"
    if phase == "moving":
        return f"{moved} of {counted(whole, 'request')} moved to process {pid}"
    if phase in ("draining", "done"):
        return f"{moved} of {counted(whole, 'request')} moved to process {pid}, which serves; {found['left']} end here"
    return f"process {pid} {_SAYS.get(phase, shown.text(phase))}"


def taken_text(found: Mapping[str, Any]) -> str:
    """Return in one line what a process has taken over when it began."""
    taken = f"{counted(found['moved'], 'request')} taken over {shown.age(found['ago_s'])} ago"
    frozen = f", frozen {shown.brief(found['longest_freeze_s'])} at most" if found["moved"] else ""
    return f"{taken}{frozen}{'; the process before still ends requests' if found['giving'] else ''}"


def news(stats: Mapping[str, Any]) -> str | None:
    """Return in one line what a live screen should say of restarts; None: nothing is under way, and none has failed."""
    restart, taken = stats.get("restart"), stats.get("taken")
    if restart is not None and not (restart["check"] and restart["phase"] in ("checked", "failed")):
        return restart_text(restart)
    if taken is not None and (taken["giving"] or taken["ago_s"] < _NEW_S):
        return taken_text(taken)
    return None
