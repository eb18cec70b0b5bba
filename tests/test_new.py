"""`reqtable new`: what it writes is formatted, typed, tested and served, for each style."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import blocks, commands
from tests.support import WAIT_S, Client
from tests.test_cli import COMMAND, port_of, reqtable_serve

pytestmark = pytest.mark.timeout(240)  # a test starts several programs, one after the other
GET = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
STYLES = {
    "state": (b"one two\nquit\n", b"hello\n2 words\nbye\n"),
    "async": (b"one two\nquit\n", b"hello\n2 words\nbye\n"),
    "blocking": (b"one two\nquit\n", b"hello\n2 words\nbye\n"),
    "http": (GET, b"POST text to count its words\n"),
    "websocket": (GET, b""),
}


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=2 * WAIT_S, check=False)


def new(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run(folder, *COMMAND, "new", *words)


@pytest.mark.parametrize("style", STYLES)
def test_what_it_writes_passes_its_test_and_is_served(style: str, tmp_path: Path) -> None:
    made = new(tmp_path, "word_count.py", f"--{style}")
    assert (made.returncode, made.stderr) == (0, "")
    assert made.stdout.splitlines()[1:] == [
        "    python -m pytest test_word_count.py",
        "    reqtable serve word_count.py:WordCount",
    ]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["test_word_count.py", "word_count.py"]
    tested = run(tmp_path, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_word_count.py")
    assert tested.returncode == 0, tested.stdout
    checked = run(tmp_path, *COMMAND, "check", "word_count.py:WordCount")
    assert checked.stdout == "word_count.py:WordCount: no findings\n"
    sent, answer = STYLES[style]
    with reqtable_serve(f"{tmp_path}/word_count.py:WordCount", "--bind", "tcp://127.0.0.1:0") as (_, [line]):
        with Client(("127.0.0.1", port_of(line))) as client:
            got = client.send(sent).rest()
    assert got.endswith(answer)
    assert got


def test_what_it_writes_is_formatted_and_typed(tmp_path: Path) -> None:
    for style in STYLES:
        assert new(tmp_path, f"{style}_words.py", f"--{style}").returncode == 0
    for tool in (["ruff", "format", "--check", "--isolated"], ["ruff", "check", "--isolated"], ["mypy", "--strict"]):
        pytest.importorskip(tool[0])
        judged = run(tmp_path, sys.executable, "-m", *tool, *sorted(each.name for each in tmp_path.glob("*.py")))
        assert judged.returncode == 0, judged.stdout + judged.stderr


def test_the_state_machine_is_the_default(tmp_path: Path) -> None:
    assert new(tmp_path, "smtp.py").returncode == 0
    assert "class Smtp(StateRequestHandler):" in (tmp_path / "smtp.py").read_text()


@pytest.mark.parametrize("exists", ["smtp.py", "test_smtp.py"])
def test_it_overwrites_nothing(exists: str, tmp_path: Path) -> None:
    (tmp_path / exists).write_text("mine")
    refused = new(tmp_path, "smtp.py")
    assert (refused.returncode, refused.stderr) == (2, f"reqtable: {exists} exists already: choose another name\n")
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [(exists, "mine")]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("foo", "the name of a module's file ends in .py, as in smtp.py"),
        ("guess.py:Guess", "give the file alone, such as guess.py: the class is named after the file"),
        ("a-b.py", "Python can't import a module of that name: use letters, digits and underscores, as in a_b.py"),
        ("1.py", "Python can't import a module of that name: use letters, digits and underscores, as in smtp.py"),
        ("class.py", "Python can't import a module of that name: use letters, digits and underscores, as in smtp.py"),
        ("_.py", "Python can't import a module of that name: use letters, digits and underscores, as in smtp.py"),
        *[
            (f"{each}.py", f"Python has a module {each} already, which this one would hide: choose another name")
            for each in ("json", "reqtable", "pytest", "__main__")
        ],
        ("sub/x.py", "there is no folder sub: make it, or choose another one"),
    ],
)
def test_a_file_that_can_not_be_imported_or_written_is_refused(name: str, says: str, tmp_path: Path) -> None:
    refused = new(tmp_path, name)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == f"reqtable: {name}: {says}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_nothing_is_a_file_that_exists(tmp_path: Path) -> None:
    (tmp_path / "smtp.py").symlink_to("none")
    assert new(tmp_path, "smtp.py").stderr == "reqtable: smtp.py exists already: choose another name\n"


def test_the_page_shows_commands_that_work(tmp_path: Path) -> None:
    [block] = blocks("docs/how-to/start-a-handler.md")
    for command in commands(block):
        program, *words = command.words
        done = run(tmp_path, sys.executable, *(["-m", "reqtable"] if program == "reqtable" else []), *words)
        assert done.returncode == 0, done.stdout + done.stderr
