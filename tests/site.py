"""The site of the documentation, built once for all tests."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILD_S = 300  # on a busy machine; it takes ten seconds


def built_site(factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Return the folder of the site, which the first test that asks for it has built, in whatever process it runs."""
    shared = factory.getbasetemp() if worker_id == "master" else factory.getbasetemp().parent
    folder = shared / "site"
    with (shared / "site.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)]
            done = subprocess.run(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=BUILD_S
            )
            (shared / "site.log").write_text(f"{done.returncode}\n{done.stdout}")
    return folder


def said(site: Path) -> str:
    """Return what the build of the site has said: its exit code, then its log."""
    return (site.parent / "site.log").read_text()
