"""`reqtable record`: prints what is in the record of a request, without the program that it belongs to."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from reqtable.run.commands import shown
from reqtable.run.commands.asking import print_json
from reqtable.table.addresses import printable
from reqtable.table.describing import description_of
from reqtable.table.errors import ReqtableError

_FILE_BYTES_MAX = 2**30
_WHY_MAX = 200  # characters of the reason why a file can't be read: it may repeat what is in the file
_PARTS = ("fields", "told", "unsent_else", "connections", "files")  # lists and mappings: they come last


@click.command("record", short_help="A record that `reqtable show --save` has written.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def record_command(file: Path, as_json: bool) -> None:
    """Print the record of a request in FILE: its handler, its state, its fields, its unread input, its unsent output.

    Nothing of the program is imported. Long values, and all but the first bytes of input and output, are left out.
    """
    try:
        found = description_of(_octets_of(file))
    except ReqtableError as error:
        raise click.ClickException(f"{shown.text(file)}: {shown.cut(shown.text(error), _WHY_MAX)}") from None
    except OSError as error:
        raise click.ClickException(f"{shown.text(file)}: {error.strerror}") from None
    if as_json:
        print_json(found)
    else:
        shown.print_lines(_lines(found))


def _octets_of(file: Path) -> bytes:
    with file.open("rb") as opened:
        if stat.S_ISREG(file.stat().st_mode) and file.stat().st_size > _FILE_BYTES_MAX:
            raise ReqtableError("too large for the record of one request")
        return opened.read(_FILE_BYTES_MAX)


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    yield from shown.pairs(
        (name.removesuffix("_s"), _text(name, value)) for name, value in found.items() if name not in _PARTS
    )
    if found["fields"]:
        yield "fields"
        yield from shown.pairs(found["fields"].items(), "  ")
    for name, heading in (("told", "items told to it"), ("unsent_else", "files to be sent")):
        if found[name]:
            yield heading
            yield from (f"  {each}" for each in found[name])
    for each in found["connections"]:
        yield f"connection {each['id']} to {each['address']}"
        yield from shown.pairs(((name, _text(name, each[name])) for name in ("unread", "unsent")), "  ")
    for each in found["files"]:
        yield f"file {each['name']}, opened as {each['mode']}"


def _text(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return _octets_text(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return shown.age(value) if name.endswith("_s") else shown.text(value)


def _octets_text(found: Mapping[str, Any]) -> str:
    """Return how many bytes there are, and the first ones."""
    head = found["head"].encode("latin-1")
    if not head:
        return "-"
    return f"{printable(repr(head)[1:])}{'' if len(head) == found['bytes'] else ' and more'}, {found['bytes']} bytes"
