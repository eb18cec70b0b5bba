"""What docs/reference/versions.md and SECURITY.md promise fits the code."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import reqtable
from reqtable.handover import messages
from reqtable.table import plain, saving
from reqtable.table.errors import ReqtableError

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "reference" / "versions.md").read_text()


def test_the_page_names_the_formats() -> None:
    rows = dict(re.findall(r"^\| of (a record|the messages between two processes) \| (\d+) \|", PAGE, re.MULTILINE))
    assert rows == {"a record": str(saving.FORMAT), "the messages between two processes": str(messages.FORMAT)}


def test_a_record_of_another_format_is_refused() -> None:
    other = plain.encode([saving.FORMAT + 1, "anything"])
    with pytest.raises(ReqtableError, match=rf"not a record of format {saving.FORMAT}, but of format"):
        saving.head_of(other)


def test_the_page_names_the_variables_of_the_environment() -> None:
    """The others are for processes that reqtable starts, and for shells."""
    sources = "".join(path.read_text() for path in (ROOT / "reqtable").rglob("*.py"))
    used = set(re.findall(r"REQTABLE_[A-Z]+", sources)) - {
        "REQTABLE_ACTIVATED",
        "REQTABLE_HANDOVER",
        "REQTABLE_COMPLETE",
    }
    assert set(re.findall(r"`(REQTABLE_[A-Z]+)`", PAGE)) == used


def test_the_pythons_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11"
    assert "Python :: 3.11" in "".join(project["classifiers"])
    assert "3.11 or later" in PAGE
    assert "Python 3.11 or later" in (ROOT / "docs" / "how-to" / "install.md").read_text()


def test_the_version_is_before_the_first_that_promises() -> None:
    assert reqtable.__version__.startswith("0.")
    assert "the version is 0.1" in (ROOT / "SECURITY.md").read_text()
