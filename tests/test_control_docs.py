"""The curl lines of docs/reference/control-api.md work as they stand."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from examples.notes import Notes
from reqtable.control.api import ControlHandler
from tests.pages import Command, blocks, commands, text_of
from tests.test_control import clients, controlled

PAGE = "docs/reference/control-api.md"
LINES = [command for block in blocks(PAGE, "console") for command in commands(block)]


def test_there_are_lines() -> None:
    assert len(LINES) >= 10


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.block.place)
def test_a_curl_line_is_answered(tmp_path: Path, line: Command) -> None:
    with controlled(tmp_path, Notes) as (server, operator), clients(server, 2) as made:
        operator.rows_once(lambda rows: len(rows) == 2)
        command = [word.replace("$CONTROL", operator.path) for word in line.words]
        ran = subprocess.run([*command, "-w", "\n%{http_code}"], capture_output=True, text=True, timeout=20)
        body, _, status = ran.stdout.rpartition("\n")
        assert status == "200", ran
        if "/v1/events" in command[-1]:
            assert body.startswith(":")
        else:
            json.loads(body)
        assert made[1].ask(b"count\n")


def test_every_resource_is_in_the_page() -> None:
    methods = [getattr(ControlHandler, name) for name in dir(ControlHandler)]
    paths = {path for each in methods for _, path in getattr(each, "routes", ())}
    assert len(paths) >= 14
    for path in paths:
        assert path.replace("{id}", "ID") in text_of(PAGE), path
