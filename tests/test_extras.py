"""What is missing without each extra, and what the message says. Without extras, everything else works."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.support import WAIT_S

ROOT = Path(__file__).parent.parent
# Runs a feature without a package, and prints the error: the package can't be imported, as if it were not installed.
WITHOUT = """
import importlib.abc
import sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import reqtable

try:
    exec(sys.argv[2])
except reqtable.ConfigurationError as error:
    print(error)
"""
MULTIPART = """
from reqtable.http.forms import parse_form
parse_form("multipart/form-data; boundary=x", b"--x--")
"""
METRICS = """
from reqtable.control.exposition import check_client
check_client()
"""
OTEL = """
from reqtable.control.tracing import Traced
Traced(None)
"""
TOP = """
import sys
from reqtable.run.cli import main
with __import__("contextlib").redirect_stderr(sys.stdout):
    main(["top", "--once", "--control", "/no/such/socket"])
"""
CLUSTER = """
options = reqtable.config.ExecutorOptions(factory="distributed:Client")
config = reqtable.Config(executors={"dask": options})
class Idle(reqtable.AsyncRequestHandler):
    async def handle(self):
        pass
reqtable.TCPServer(("127.0.0.1", 0), Idle, config=config)
"""
CASES = {
    "http": ("python_multipart", MULTIPART, "multipart forms need python-multipart"),
    "metrics": ("prometheus_client", METRICS, "metrics need the package prometheus-client"),
    "otel": ("opentelemetry", OTEL, "traces need the package opentelemetry-api"),
    "top": ("rich", TOP, "reqtable: reqtable top needs rich"),
    "cluster": ("distributed", CLUSTER, ".*: factory 'distributed:Client': ModuleNotFoundError: No module .*"),
}


def extras() -> dict[str, list[str]]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return found["project"]["optional-dependencies"]  # type: ignore[no-any-return]


def test_all_has_every_extra_that_is_missed() -> None:
    assert extras()["all"] == [f"reqtable[{','.join(sorted(CASES))}]"]


def test_the_page_names_every_extra_and_its_package() -> None:
    page = (ROOT / "docs" / "how-to" / "install.md").read_text()
    named = dict(re.findall(r"^\| `(\w+)` \|.*\| (\S+) \|$", page, re.MULTILINE))
    assert named == {extra: re.split("[>=]", extras()[extra][0])[0] for extra in CASES}


@pytest.mark.parametrize("extra", CASES)
def test_a_missing_extra_is_named_in_one_line(extra: str, tmp_path: Path) -> None:
    package, code, says = CASES[extra]
    command = [sys.executable, "-W", "ignore::ResourceWarning", "-c", WITHOUT, package, code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=WAIT_S)
    assert done.stderr == ""
    assert re.fullmatch(rf"{says}: pip install 'reqtable\[{extra}\]'\n", done.stdout), done.stdout
