"""Builds the image of a Dockerfile without Docker: with this machine's own files in place of each base image.

Each stage is an overlay: its steps see all files of this machine, and what they write goes to a folder of the stage.
Each step runs in a change root in that overlay, as written. This needs root, and Linux.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parent.parent
STEP_S = 240.0
# Mounts the overlay $1/merged, and runs the rest of the words there. The shell's mounts are seen by no other process.
_IN_OVERLAY = (
    "set -e; here=$1; shift; "
    'mount -t overlay overlay -o "lowerdir=/,upperdir=$here/upper,workdir=$here/work" "$here/merged"; '
    'mount --rbind /dev "$here/merged/dev"; mount -t proc proc "$here/merged/proc"; '
    'user=$1; shift; exec chroot --userspec="$user" "$here/merged" "$@"'
)


@dataclass
class Stage:
    """Holds what the steps of a stage have set, and the folder that they write to."""

    folder: Path
    environment: dict[str, str]
    user: str = "0:0"
    working: str = "/"
    set: dict[str, str] = field(default_factory=dict)  # each other instruction, with its text

    def __post_init__(self) -> None:
        for name in ("upper", "work", "merged"):
            (self.folder / name).mkdir(parents=True)
        python = Path(sys.executable).resolve()  # may be in a home, which other users can't enter
        closed = [str(each) for each in python.parents if not each.stat().st_mode & 0o001]
        if closed:
            self.run(["chmod", "o+x", *closed])

    def at(self, path: str) -> Path:
        """Return where a new file of the image is."""
        return self.folder / "upper" / path.lstrip("/")

    def command(self, words: list[str]) -> list[str]:
        """Return the command that runs these words in the image."""
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        inside = ["env", "-i", f"--chdir={self.working}", *variables, *words]
        return ["sh", "-c", _IN_OVERLAY, "sh", str(self.folder), self.user, *inside]

    def run(self, words: list[str]) -> None:
        """Run a step, which must not fail."""
        done = subprocess.run(
            ["unshare", "--mount", *self.command(words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=STEP_S,
        )
        assert done.returncode == 0, (words, done.stdout)


def parsed(text: str) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile, each with what follows its name."""
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    found = (line.strip().partition(" ") for line in text.splitlines() if line.strip())
    return [(name, rest.strip()) for name, _, rest in found]


def words(text: str) -> list[str]:
    """Return the words of an exec form. A shell form raises ValueError: a shell would not pass signals on."""
    found: list[str] = json.loads(text)
    return found


@functools.cache
def can_build() -> bool:
    """Return whether a step can run here. Root may lack the right to mount, or the disk may bear no overlay."""
    if sys.platform != "linux" or os.geteuid() or not (shutil.which("unshare") and shutil.which("nsenter")):
        return False
    with tempfile.TemporaryDirectory(prefix="reqtable-") as folder:
        try:
            Stage(Path(folder) / "probe", _base_environment()).run(["true"])
        except AssertionError:
            return False
    return True


def build(dockerfile: Path, folder: Path) -> Stage:
    """Run the steps of a Dockerfile. Returns the last stage."""
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for name, text in parsed(dockerfile.read_text()):
        if name == "FROM":
            stage = Stage(folder / str(len(stages)), _base_environment())
            stages[text.partition(" AS ")[2] or "last"] = stage
        elif stage is not None:
            _take(name, text, stage, stages)
    return stages["last"]


def _base_environment() -> dict[str, str]:
    """Return the variables of a base image: its PATH finds this Python. Pip finds the index that it finds here."""
    pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_") or "_proxy" in name.lower()}
    path = f"{Path(sys.executable).resolve().parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {**pip, "HOME": "/root", "PATH": path}


def _take(name: str, text: str, stage: Stage, stages: dict[str, Stage]) -> None:
    if name == "RUN":
        stage.run(["/bin/sh", "-c", text])
    elif name == "COPY":
        _copy(text, stage, stages)
    elif name in ("ARG", "ENV"):
        for variable, value in re.findall(r"(\w+)=(\S+)", text):
            stage.environment[variable] = value.replace("$PATH", stage.environment["PATH"])
    elif name == "WORKDIR":
        stage.working = text
        stage.at(text).mkdir(parents=True, exist_ok=True)
    elif name == "USER":
        stage.user = text
    else:
        stage.set[name] = text


def _copy(text: str, stage: Stage, stages: dict[str, Stage]) -> None:
    found = re.fullmatch(r"--from=(\w+) (\S+) (\S+)", text)
    if found:
        shutil.copytree(stages[found[1]].at(found[2]), stage.at(found[3]), symlinks=True)
        return
    source, target = text.split()
    assert source == ".", text
    for path in context():
        to = stage.at(target) / path
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, to)


def context() -> list[Path]:
    """Return the files of the repository that .dockerignore lets into the image."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    kept = [ROOT / pattern[1:] for pattern in patterns if pattern[0] == "!"]  # all else is excluded
    files = (path.relative_to(ROOT) for each in kept for path in (each, *each.rglob("*")) if path.is_file())
    return [path for path in files if not _is_ignored(path, patterns)]


def _is_ignored(path: Path, patterns: list[str]) -> bool:
    """Return whether the last pattern that matches the path, or a folder above it, excludes it."""
    is_ignored = False
    for pattern in patterns:
        wanted = pattern.removeprefix("!")
        for each in (path, *path.parents[:-1]):
            if each.match(wanted.removeprefix("**/")) if "**/" in wanted else fnmatch(str(each), wanted):
                is_ignored = wanted == pattern
    return is_ignored
