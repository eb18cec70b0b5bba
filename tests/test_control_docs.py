"""The curl lines of docs/how-to/look-at-a-server.md work as they stand."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from examples.notes import Notes
from reqtable.control.api import ControlHandler
from tests.test_control import clients, controlled

PAGE = (Path(__file__).parent.parent / "docs" / "how-to" / "look-at-a-server.md").read_text()
LINES = [
    text.removeprefix("$ ")
    for block in re.findall(r"^```console\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    for text in block.splitlines()
    if text.startswith("$ curl")
]


def test_there_are_lines() -> None:
    assert len(LINES) >= 10


@pytest.mark.parametrize("text", LINES)
def test_a_curl_line_is_answered(tmp_path: Path, text: str) -> None:
    with controlled(tmp_path, Notes) as (server, operator), clients(server, 2) as made:
        operator.rows_once(lambda rows: len(rows) == 2)
        command = shlex.split(text.replace("$CONTROL", operator.path))
        ran = subprocess.run([*command, "-w", "\n%{http_code}"], capture_output=True, text=True, timeout=20)
        body, _, status = ran.stdout.rpartition("\n")
        assert status == "200", ran
        if "/v1/events" in text:
            assert body.startswith(":")
        else:
            json.loads(body)
        assert made[1].ask(b"count\n")


def test_every_resource_is_in_the_page() -> None:
    methods = [getattr(ControlHandler, name) for name in dir(ControlHandler)]
    paths = {path for each in methods for _, path in getattr(each, "routes", ())}
    assert len(paths) >= 14
    for path in paths:
        assert path.replace("{id}", "ID") in PAGE, path
