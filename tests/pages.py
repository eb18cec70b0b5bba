"""The blocks of the pages: README.md and docs/. `tests/test_pages.py` runs them.

- A block with `title="x.py"` is a file of its page. The files of a page are together in one folder.
- The Python blocks without a title are one program, in the order of the page. It may import the files.
- Each line of a `sh` block is a command. In a `console` block a command begins with `$ `, and its output follows.
- A line that ends in a backslash goes on in the next line.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from reqtable.run.cli import cli
from tests.support import Client

ROOT = Path(__file__).parent.parent
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")))
FENCE = re.compile(r'^```(\w*)(?: title="([^"]*)")?[^\n]*\n(.*?)^```$', re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    title: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command of a block, as the words of a shell, and the output that the page shows below it."""

    block: Block
    variables: tuple[tuple[str, str], ...]
    words: tuple[str, ...]
    output: str


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str, *languages: str) -> list[Block]:
    """Return the blocks of a page, in their order; all of them, or those of some languages."""
    text = text_of(page)
    found = [Block(page, text.count("\n", 0, each.start()) + 1, *each.groups("")) for each in FENCE.finditer(text)]
    return [each for each in found if not languages or each.language in languages]


def titled(page: str, title: str) -> str:
    """Return the file with that title on a page."""
    (block,) = (each for each in blocks(page) if each.title == title)
    return block.text


def commands(block: Block) -> list[Command]:
    """Return the commands of a block."""
    text = block.text.replace("\\\n", " ")
    if block.language == "sh":
        return [_command(block, line, "") for line in text.splitlines()]
    parts = [part.partition("\n") for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]]
    return [_command(block, line, output) for line, _, output in parts]


def _command(block: Block, line: str, output: str) -> Command:
    words = shlex.split(line, comments=True)
    variables = []
    while re.match(r"[A-Z_]+=", words[0]):
        name, _, value = words.pop(0).partition("=")
        variables.append((name, value))
    return Command(block, tuple(variables), tuple(words), output)


def check_command(words: Sequence[str]) -> None:
    """Check that these words after `reqtable` are a command, with its options and its values."""
    if words[0].startswith("-"):
        assert any(words[0] in each.opts for each in cli.get_params(click.Context(cli)))
        return
    _, found, rest = cli.resolve_command(click.Context(cli, info_name="reqtable"), [*words])
    assert found is not None
    found.make_context("reqtable", rest)


def write_files(page: str, folder: Path) -> None:
    """Write the files of a page into a folder."""
    for block in blocks(page):
        if block.title:
            (folder / block.title).write_text(block.text)


@contextlib.contextmanager
def importing(folder: Path) -> Iterator[None]:
    """Let programs import the files of a folder. After the block, these modules are forgotten."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", None)).startswith(str(folder)):
                del sys.modules[name]


@contextlib.contextmanager
def played(page: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Run the Python blocks without a title of a page, and yield the names that they define."""
    write_files(page, folder)
    module = types.ModuleType("page_" + Path(page).stem.replace("-", "_"))
    with importing(folder), contextlib.ExitStack() as stack:
        sys.modules[module.__name__] = module
        stack.callback(sys.modules.pop, module.__name__)
        for block in blocks(page, "python"):
            if not block.title:
                exec(compile("\n" * block.line + block.text, str(ROOT / page), "exec"), vars(module))
        yield vars(module)


@contextlib.contextmanager
def running(page: str, title: str, folder: Path) -> Iterator[tuple[str, int]]:
    """Run a program of a page, which prints its port, connect a silent client, and yield the address."""
    write_files(page, folder)
    command = [sys.executable, "-W", "ignore::DeprecationWarning", title]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        address = ("127.0.0.1", int(process.stdout.readline()))
        with Client(address):
            yield address
    finally:
        process.kill()
        process.communicate()
