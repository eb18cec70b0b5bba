"""`reqtable new`: writes a small handler and its test, to begin with."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from keyword import iskeyword
from pathlib import Path
from string import Template

import click

_TEMPLATES = Path(__file__).parent.parent / "templates"


@click.command("new", short_help="Write a small handler and its test.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--state", "style", flag_value="state", default=True, help="A state machine (the default).")
@click.option("--async", "style", flag_value="async", help="A coroutine.")
@click.option("--blocking", "style", flag_value="blocking", help="A blocking handler, as in socketserver.")
@click.option("--http", "style", flag_value="http", help="A state machine that answers HTTP.")
@click.option("--websocket", "style", flag_value="websocket", help="A state machine that speaks WebSocket.")
def new_command(file: Path, style: str) -> None:
    """Write a handler to FILE, such as smtp.py, and its test beside it, to test_smtp.py.

    Nothing is written if one of them exists.
    """
    test = file.with_name(f"test_{file.name}")
    for each in (file, test):
        if os.path.lexists(each):
            raise click.UsageError(f"{each} exists already: choose another name")
    module = file.stem
    if file.suffix != ".py" or not _is_free(module):
        raise click.UsageError(f"{file}: name a module that Python can import and does not have, such as smtp.py")
    names = {"module": module, "Name": "".join(each[:1].upper() + each[1:] for each in module.split("_"))}
    for path, template in ((file, f"{style}.txt"), (test, f"{style}_test.txt")):
        text = Template((_TEMPLATES / template).read_text("utf-8")).substitute(names)
        with path.open("x", encoding="utf-8") as own:
            own.write(text)
    click.echo(f"{file} has a handler, and {test} its test. Next:")
    click.echo(f"    python -m pytest {test}")
    click.echo(f"    reqtable serve {file}:{names['Name']}")


def _is_free(module: str) -> bool:
    """Return whether a module may have that name: it would hide an installed package of the same name."""
    if not module.isidentifier() or iskeyword(module) or not module.strip("_"):
        return False
    return module not in sys.modules and find_spec(module) is None
