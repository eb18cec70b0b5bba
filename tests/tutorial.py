"""A reader of a tutorial: writes its files, runs its commands, and compares what they print with what it shows.

A page is read from top to bottom:

- A block with `title="till.py"` is a file. A Python block that has only imports, or none, is a part of a file that is
  there already. An import replaces the one from the same module. If the block is indented, it has
  members of the file's last class; otherwise it has functions. Each replaces the one of the same name, or is added at
  the end. Cases are put before the first case of the file's first `match`.
- A `console` block has commands, each after `$ `, and what they print. A line after `> ` is typed into the command. A
  server or a `reqtable talk` goes on in its terminal; the next one stops it. A command that ends in `&` goes on, too.
- A `console` block without a command goes on in the terminal of its title: the server's, or the client's.

What is shown must be printed in this order. `…` stands for any text, and, alone in a line, for any lines. Times, sizes
and long numbers, such as ports and process ids, may differ. A later command may use a number that was shown.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from tests.pages import blocks
from tests.support import WAIT_S, reserved_port

SERVERS = ("reqtable serve", "reqtable wsgi", "reqtable http")
DEFAULT_BINDS = {"reqtable serve": "tcp://127.0.0.1:7000", "reqtable wsgi": "tcp://127.0.0.1:8000"}
INSTALLS = ("python3 -m venv", ". venv/bin/activate", "pip install", "mkdir", "cd ")  # the reader's folder is there
LOOKS = ("reqtable ps", "reqtable show", "reqtable workers")  # what was typed before may still be on its way
VARYING = re.compile(
    r"\d{4}-\d\d-\d\d|\d\d:\d\d:\d\d(?:,\d+)?"  # dates, and times of the day
    r"|\d[\d.]*(?:ms|s|K|M|MB|%)\b|\d+\.\d+|\d+(?= ms)"  # times and sizes
    r"|\b\d{4,}\b"  # ports, process ids, and the ids of requests in workers
)


class Terminal:
    """Runs one command. What it prints is collected in `text`."""

    def __init__(self, command: str, folder: Path, env: dict[str, str]) -> None:
        self.command = command
        self.text = ""
        self.seen = 0  # up to here, the page has shown what was printed
        self.process = subprocess.Popen(
            command,
            shell=True,
            cwd=folder,
            env=env,
            text=True,
            bufsize=1,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that a server can be stopped with those that take its place
        )
        self.thread = threading.Thread(target=self._collect)
        self.thread.start()

    def _collect(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if "INFO control: listening on" not in line:  # logged because of REQTABLE_CONTROL, which no reader sets
                self.text += line

    def type(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def wait(self) -> None:
        """Wait until the command has ended."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(3 * WAIT_S)
        self.thread.join(WAIT_S)

    def stop(self) -> None:
        """Stop the command as Ctrl-C does, with all processes that it has started."""
        for number in (signal.SIGINT, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            self.thread.join(WAIT_S)  # until the last process has closed the output
            if not self.thread.is_alive():
                break
        self.process.wait(WAIT_S)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


class Reader:
    """Reads a page in a folder of its own, as a context manager."""

    def __init__(self, page: Path, folder: Path) -> None:
        self.page = page.name
        self.folder = folder
        self.same: dict[str, str] = {}  # what the page shows: what it is here
        self.ports = contextlib.ExitStack()
        for port in sorted(set(re.findall(r"(?:127\.0\.0\.1|localhost):(\d{4,5})", page.read_text()))):
            self.same[port] = str(self.ports.enter_context(reserved_port()))
        self.blocks = blocks(str(page))
        self.server: Terminal | None = None
        self.client: Terminal | None = None
        self.background: list[Terminal] = []
        self.before: dict[str, Callable[[], None]] = {}  # what to do once before a command
        self.sockets = tempfile.TemporaryDirectory(prefix="reqtable-tutorial-")  # short, as paths of sockets must be
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("REQTABLE", "PYTEST"))}
        # The commands find the reader's server, although other servers may run on this machine.
        self.env["REQTABLE_CONTROL"] = f"{self.sockets.name}/control.sock"
        self.env |= {"PYTHONUNBUFFERED": "1", "COLUMNS": "120", "NO_COLOR": "1"}
        self.env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        for terminal in (self.client, *self.background, self.server):
            if terminal is not None:
                terminal.stop()
                if kind is not None:
                    print(f"$ {terminal.command}\n{terminal.text}")
        self.sockets.cleanup()
        self.ports.close()

    def port(self, shown: int) -> int:
        return int(self.same[str(shown)])

    def read(self) -> None:
        """Read the page to its end."""
        for block in self.blocks:
            if block.language == "console":
                self._follow(block.title, block.text)
            else:
                self._write(self.folder / block.title, self._as_here(block.text))

    # -- files --------------------------------------------------------------------------------------------------------

    def write_files(self) -> None:
        """Write the files as they are at the end of the page, and run nothing."""
        for block in self.blocks:
            if block.language != "console":
                self._write(self.folder / block.title, block.text)

    def _write(self, path: Path, block: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".py" and path.exists():
            block = _changed(path.read_text(), block)
        path.write_text(block)

    # -- commands -----------------------------------------------------------------------------------------------------

    def _follow(self, title: str, block: str) -> None:
        if not block.startswith("$ "):
            terminal = self.client if "client" in title else self.server
            assert terminal is not None, f"{self.page}: {title!r} is no terminal"
            self._talk(terminal, block.splitlines())
            return
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, shown = re.sub(r"\\\n\s*", "", part).partition("\n")
            self._run(command, shown.splitlines())

    def _run(self, command: str, shown: list[str]) -> None:
        if command.startswith(INSTALLS):
            return
        self.before.pop(command, lambda: None)()
        command = self._as_here(command)
        if command == "wait":
            self._wait(shown)
        elif command.startswith(SERVERS):
            if self.server is not None:
                self.server.stop()
            name = " ".join(command.split()[:2])
            if "--bind" not in command and name in DEFAULT_BINDS:
                command += f" --bind {self._as_here(DEFAULT_BINDS[name])}"
            self.server = Terminal(f"exec {command}", self.folder, self.env)
            self._talk(self.server, shown or ["serving …"])
        elif command.startswith("reqtable talk"):
            if self.client is not None:
                self.client.stop()
            self.client = Terminal(f"exec {command}", self.folder, self.env)
            self._talk(self.client, shown)
        elif command.endswith("&"):
            self.background.append(Terminal(command.rstrip(" &"), self.folder, self.env))
        else:
            self._run_once(command, shown, time.monotonic() + (WAIT_S if command.startswith(LOOKS) else 0))

    def _wait(self, shown: list[str]) -> None:
        """Wait for the commands in the background. They may end in any order."""
        printed: list[str] = []
        while self.background:
            self.background[0].wait()
            self.background[0].stop()
            printed += self.background.pop(0).text.splitlines()
        assert sorted(printed) == sorted(shown), f"{self.page}: {printed}"

    def _run_once(self, command: str, shown: list[str], until: float) -> None:
        """Run a command, again and again until a time if what it prints is not what is shown."""
        terminal = Terminal(command, self.folder, self.env)
        try:
            terminal.wait()
            problem = self._missing(terminal, shown)
            assert problem is None or time.monotonic() < until, (
                f"{self.page}: `{command}` did not print {problem!r}, but:\n{terminal.text}"
            )
            assert shown or terminal.process.returncode == 0, f"{self.page}: `{command}` failed:\n{terminal.text}"
        finally:
            terminal.stop()
        if problem is not None:
            self._run_once(command, shown, until)

    def _talk(self, terminal: Terminal, shown: list[str]) -> None:
        """Type the lines after `> `, each when what is shown before it was printed."""
        expected: list[str] = []
        for line in [*shown, None]:
            if line is not None and not line.startswith("> "):
                expected.append(line)
                continue
            self._expect(terminal, expected)
            expected = []
            if line is not None:
                terminal.type(self._as_here(line[2:]))

    def _expect(self, terminal: Terminal, shown: list[str]) -> None:
        """Wait until a terminal has printed the lines that are shown."""
        end = time.monotonic() + WAIT_S
        while (problem := self._missing(terminal, shown)) is not None:
            is_late = time.monotonic() > end or not terminal.thread.is_alive()
            if is_late and self._missing(terminal, shown) is not None:
                raise AssertionError(
                    f"{self.page}: `{terminal.command}` did not print {problem!r}, but:\n{terminal.text}"
                )
            terminal.thread.join(0.05)

    def _missing(self, terminal: Terminal, shown: list[str]) -> str | None:
        """Return the first line that is shown and was not printed; None if there is none."""
        position, may_skip = terminal.seen, True
        for line in shown:
            if line.strip() in ("", "…"):
                may_skip = True
                continue
            pattern = re.compile(_pattern(self._as_here(line)))
            for start, printed in _lines(terminal.text, position):
                if pattern.fullmatch(_squeezed(printed)):
                    self._learn(line, printed)
                    position = start + len(printed)
                    break
                if not may_skip and printed.strip():
                    return line
            else:
                return line
            may_skip = False
        terminal.seen = position
        return None

    def _learn(self, shown: str, printed: str) -> None:
        """Note the numbers that differ, such as process ids."""
        for there, here in zip(shown.split(), printed.split(), strict=False):
            if there.isdigit() and here.isdigit() and len(there) >= 4:
                self.same.setdefault(there, here)

    def _as_here(self, text: str) -> str:
        """Replace the numbers of the page by those of this run."""
        return re.sub(r"\d+", lambda found: self.same.get(found[0], found[0]), text)


def _lines(text: str, position: int) -> list[tuple[int, str]]:
    """Return the whole lines from a position on, each with where it starts."""
    found = []
    for line in text[position:].splitlines(keepends=True):
        found.append((position, line))
        position += len(line)
    return found


def _squeezed(line: str) -> str:
    return " ".join(line.split())


def _pattern(shown: str) -> str:
    """Return the pattern of the lines that match one that is shown."""
    return ".*".join(
        f"(?:{VARYING.pattern})".join(re.escape(each) for each in VARYING.split(part)) if part else ""
        for part in _squeezed(shown).split("…")
    )


def _changed(text: str, block: str) -> str:
    """Return the new text of a file, of which the page has shown a block."""
    if block.lstrip().startswith("case "):
        return _with_cases(text, block)
    if block.startswith(" "):
        return _with_members(text, block)
    imports = [isinstance(each, ast.Import | ast.ImportFrom) for each in ast.parse(block).body]
    if any(imports):
        return _with_imports(text, block) if all(imports) else block  # the whole file
    return _with_functions(text, block)


def _with_members(text: str, block: str) -> str:
    """Replace members of the last class in a file, or add them: fields after the fields, and others at the end."""
    for member in ast.parse("class _:\n" + block).body[0].body:  # type: ignore[attr-defined]
        new = block.splitlines()[_first_line(member) - 2 : member.end_lineno - 1]
        owner = [each for each in ast.parse(text).body if isinstance(each, ast.ClassDef)][-1]
        fields = [each for each in owner.body if isinstance(each, ast.AnnAssign | ast.Assign)]
        if replaced := _replace(text, owner.body, member, new):
            text = replaced
        elif isinstance(member, ast.AnnAssign | ast.Assign):
            text = _insert(text, fields[-1].end_lineno if fields else owner.lineno, new if fields else [*new, ""])
        else:
            text = _insert(text, owner.end_lineno, ["", *new])
    return text


def _with_imports(text: str, block: str) -> str:
    """Replace imports of a file, each from one module."""
    for new in ast.parse(block).body:
        assert isinstance(new, ast.ImportFrom)
        [old] = [
            each for each in ast.parse(text).body if isinstance(each, ast.ImportFrom) and each.module == new.module
        ]
        lines = text.splitlines()
        lines[old.lineno - 1 : old.end_lineno] = block.splitlines()[new.lineno - 1 : new.end_lineno]
        text = "\n".join(lines) + "\n"
    return text


def _with_functions(text: str, block: str) -> str:
    """Replace functions of a file, or add them at its end."""
    for function in ast.parse(block).body:
        new = block.splitlines()[_first_line(function) - 1 : function.end_lineno]
        text = _replace(text, ast.parse(text).body, function, new) or _insert(
            text, len(text.splitlines()), ["", "", *new]
        )
    return text


def _replace(text: str, body: list[ast.stmt], member: ast.stmt, new: list[str]) -> str | None:
    """Replace the statement that defines the same name; None if there is none."""
    for old in body:
        if _name(old) is not None and _name(old) == _name(member):
            lines = text.splitlines()
            lines[_first_line(old) - 1 : old.end_lineno] = new
            return "\n".join(lines) + "\n"
    return None


def _insert(text: str, place: int | None, new: list[str]) -> str:
    lines = text.splitlines()
    lines[place:place] = new
    return "\n".join(lines) + "\n"


def _with_cases(text: str, block: str) -> str:
    """Replace cases of the first `match` in a file, or add them before its first case."""
    indented = "class _:\n    def _():\n        match _:\n" + block
    for new in _match(indented).cases:
        lines = text.splitlines()
        cases = _match(text).cases
        old = [each for each in cases if ast.unparse(each.pattern) == ast.unparse(new.pattern)]
        first = (old or cases)[0].pattern.lineno - 1
        last = old[0].body[-1].end_lineno if old else first
        lines[first:last] = indented.splitlines()[new.pattern.lineno - 1 : new.body[-1].end_lineno]
        text = "\n".join(lines) + "\n"
    return text


def _match(text: str) -> ast.Match:
    return next(each for each in ast.walk(ast.parse(text)) if isinstance(each, ast.Match))


def _first_line(member: ast.stmt) -> int:
    decorators = getattr(member, "decorator_list", [])
    return min([member.lineno, *(each.lineno for each in decorators)])


def _name(member: ast.stmt) -> str | None:
    target = getattr(member, "target", None) or next(iter(getattr(member, "targets", [])), None)
    return getattr(member, "name", None) or getattr(target, "id", None)
