"""`reqtable new`: writes a small handler and its test, to begin with."""

from __future__ import annotations

import os
import re
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
    if (problem := _problem_of(file)) is not None:
        raise click.UsageError(f"{file}: {problem}")
    names = {"module": module, "Name": "".join(each[:1].upper() + each[1:] for each in module.split("_"))}
    for path, template in ((file, f"{style}.txt"), (test, f"{style}_test.txt")):
        text = Template((_TEMPLATES / template).read_text("utf-8")).substitute(names)
        with path.open("x", encoding="utf-8") as own:
            own.write(text)
    click.echo(f"{file} has a handler, and {test} its test. Next:")
    click.echo(f"    python -m pytest {test}")
    click.echo(f"    reqtable serve {file}:{names['Name']}")


def _problem_of(file: Path) -> str | None:
    """Return why no handler can be written to `file`, and the mend; None if one can."""
    module = file.stem
    if ":" in file.name:
        return f"give the file alone, such as {file.name.partition(':')[0]}: the class is named after the file"
    if file.suffix != ".py":
        return "the name of a module's file ends in .py, as in smtp.py"
    if not module.isidentifier() or iskeyword(module) or not module.strip("_"):
        mend = re.sub(r"\W", "_", module, flags=re.ASCII)
        example = f"{mend}.py" if mend.isidentifier() and mend != module else "smtp.py"
        return f"Python can't import a module of that name: use letters, digits and underscores, as in {example}"
    if module in sys.modules or find_spec(module) is not None:
        return f"Python has a module {module} already, which this one would hide: choose another name"
    if not file.parent.is_dir():
        return f"there is no folder {file.parent}: make it, or choose another one"
    return None
