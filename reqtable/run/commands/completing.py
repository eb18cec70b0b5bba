"""Completes words in the shell: words that are known here, and words that the server knows."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import click

from reqtable.run.commands.asking import Asked

Completing = Callable[[click.Context, click.Parameter, str], list[str]]

_ANSWER_S = 0.5
_IDS_MAX = 100


def one_of(words: Iterable[str]) -> Completing:
    """Complete one of these words, in capitals or not."""
    known = list(words)

    def complete(context: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
        return [each for each in known if each.casefold().startswith(begun.casefold())]

    return complete


def list_of(words: Iterable[str]) -> Completing:
    """Complete the last word of a list with commas."""
    known = list(words)

    def complete(context: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
        before, comma, last = begun.rpartition(",")
        return [before + comma + each for each in known if each.startswith(last)]

    return complete


def known_ids(context: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
    """Complete the id of a request: those of the oldest ones."""
    return _asked(context, "/v1/requests", "id", begun, sort="age", limit=_IDS_MAX)


def known_workers(context: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
    """Complete the process number of a worker."""
    return _asked(context, "/v1/workers", "worker", begun)


def known_keys(context: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
    """Complete a key of the configuration, with the sign that a value follows."""
    return [f"{each}=" for each in _asked(context, "/v1/config", "key", begun)]


def _asked(context: click.Context, place: str, name: str, begun: str, **query: object) -> list[str]:
    """Return the words that the server knows. None if it can't be asked at once: the shell shows nothing else."""
    try:
        found = Asked(context.params.get("control"), _ANSWER_S).get(place, **query)
    except (click.ClickException, ValueError):
        return []
    return [word for each in found if (word := str(each[name])).startswith(begun)]
