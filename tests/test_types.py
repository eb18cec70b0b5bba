"""Type checkers mark wrong programs, and no right one: mypy and pyright read tests/typed, the examples and a page."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests.pages import blocks

ROOT = Path(__file__).parent.parent
TYPED = sorted(path for path in (ROOT / "tests" / "typed").glob("*.py") if path.stem != "__init__")
PAGE = "docs/how-to/use-types.md"
STRICT = "right.py"  # of TYPED: right even by strict rules

pytestmark = pytest.mark.timeout(240)

Marks = dict[tuple[str, int], str]  # the name of a file, a line -> the messages about it


def mypy(folder: Path, paths: list[Path], *options: str) -> Marks:
    """Return what mypy says of the files. It gets no configuration."""
    command = [sys.executable, "-m", "mypy", "--config-file=", f"--cache-dir={folder / 'mypy'}", "--output=json"]
    done = subprocess.run([*command, *options, *map(str, paths)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    marks: Marks = defaultdict(str)
    for found in map(json.loads, filter(None, done.stdout.splitlines())):
        if found["severity"] == "error":
            marks[Path(found["file"]).name, found["line"]] += found["message"] + "\n"
    return marks


def pyright(folder: Path, paths: list[Path]) -> Marks:
    """Return what pyright says of the files. A comment in a file may name its rules; the others have pyright's own."""
    settings = {"include": [os.path.relpath(path, folder) for path in paths], "extraPaths": [str(ROOT)]}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", f"--project={folder}", f"--pythonpath={sys.executable}", "--outputjson"]
    quiet = os.environ | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}  # else it asks whether there is a newer version
    done = subprocess.run(command, cwd=folder, env=quiet, capture_output=True, text=True)
    assert done.stdout.startswith("{"), done.stderr
    said = json.loads(done.stdout)
    assert said["summary"]["filesAnalyzed"] == len(paths)
    marks: Marks = defaultdict(str)
    for found in said["generalDiagnostics"]:
        if found["severity"] == "error":
            line = found["range"]["start"]["line"] + 1
            marks[Path(found["file"]).name, line] += f"{found['message']} ({found.get('rule')})\n"
    return marks


def expected_of(checker: str, paths: list[Path]) -> Marks:
    """Return the words that each marked line must get, as its comment says: `# error: words`."""
    expected = {}
    for path in paths:
        for number, text in enumerate(path.read_text().splitlines(), 1):
            found = re.search(r"# error(?:\((\w+)\))?: (.+)$", text)
            if found is not None and found[1] in (None, checker):
                expected[path.name, number] = found[2]
    return expected


def compare(marks: Marks, expected: Marks) -> None:
    unexpected = {place: text for place, text in marks.items() if place not in expected}
    assert not unexpected, "a line is marked"
    lost = {place: words for place, words in expected.items() if words not in marks.get(place, "")}
    assert not lost, "a mark is lost"


def blocks_of_the_page(folder: Path) -> list[Path]:
    """Write the Python blocks of the page to files, each on its own."""
    paths = []
    for number, block in enumerate(blocks(PAGE)):
        assert block.language == "python"
        paths.append(folder / f"block_{number}.py")
        paths[-1].write_text(block.text)
    assert paths
    return paths


def examples() -> list[Path]:
    return sorted((ROOT / "examples").glob("*.py"))


def test_mypy_marks_what_is_wrong_and_nothing_else(tmp_path: Path) -> None:
    paths = [*TYPED, *examples(), *blocks_of_the_page(tmp_path)]
    expected = expected_of("mypy", paths)
    assert len(expected) > 90
    compare(mypy(tmp_path, paths), expected)


def test_strict_mypy_marks_nothing_that_is_right(tmp_path: Path) -> None:
    right = [path for path in TYPED if path.name == STRICT]
    compare(mypy(tmp_path, [*right, *examples()], "--strict"), {})


def test_pyright_marks_what_is_wrong_and_nothing_else(tmp_path: Path) -> None:
    paths = [*TYPED, *examples(), *blocks_of_the_page(tmp_path)]
    expected = expected_of("pyright", paths)
    assert len(expected) > 90
    compare(pyright(tmp_path, paths), expected)
