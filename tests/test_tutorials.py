"""The tutorials work: each is read from top to bottom, as its reader would."""

from __future__ import annotations

from pathlib import Path

import pytest

from reqtable.handover import sleeper
from tests.tutorial import Reader

TUTORIALS = Path(__file__).parent.parent / "docs" / "tutorials"

pytestmark = pytest.mark.timeout(600)  # they start dozens of processes


def test_the_first_server(tmp_path: Path) -> None:
    page = TUTORIALS / "first-server.md"
    assert len(page.read_text().splitlines()) < 200
    with Reader(page, tmp_path / "till") as reader:
        reader.read()


@pytest.mark.slow  # 30 commands
@pytest.mark.skipif(sleeper.why_not_here() is not None, reason="this system has no sleepers, which takeover needs")
def test_an_smtp_receiver(tmp_path: Path) -> None:
    page = TUTORIALS / "smtp.md"
    assert len(page.read_text().splitlines()) < 450
    with Reader(page, tmp_path / "mailbox") as reader:
        reader.read()


@pytest.mark.slow  # it waits for a long report, twice
def test_a_flask_application(tmp_path: Path) -> None:
    with Reader(TUTORIALS / "flask.md", tmp_path / "guests") as reader:
        reader.read()
