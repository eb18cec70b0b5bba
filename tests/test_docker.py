"""The image of the Dockerfile: built in overlays of this machine's files, because few machines run Docker."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests import docker_image
from tests.pages import blocks, check_command, commands, text_of
from tests.support import WAIT_S, Started

ROOT = Path(__file__).parent.parent
PAGE = "docs/how-to/run-in-docker.md"
HADOLINT = Path(sys.executable).parent / "hadolint"
APP = """
import reqtable

class Handler(reqtable.StateRequestHandler):
    @reqtable.state(reqtable.line())
    def only(self, text):
        self.send(text.upper())
        return self.only if text == b"one\\n" else None
"""
# A client in the container's network: it sends a line and a half, and the other half once standard input has a line.
CLIENT = """
import fcntl, socket, struct, sys
with socket.socket() as own:
    fcntl.ioctl(own, 0x8914, struct.pack("16sh14x", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP
    own.connect(("127.0.0.1", 7000))
    own.sendall(b"one\\nhe")
    answers = own.makefile()
    print(answers.readline(), end="", flush=True)
    input()
    own.sendall(b"llo\\n")
    print(answers.read(), end="", flush=True)
"""


def test_the_context_has_what_an_installation_needs_and_no_more() -> None:
    found = {str(path) for path in docker_image.context()}
    assert {"LICENSE", "README.md", "pyproject.toml", "setup.py", "reqtable/lean.c", "reqtable/py.typed"} <= found
    assert {path for path in found if "/" not in path} == {"LICENSE", "README.md", "pyproject.toml", "setup.py"}
    assert not [path for path in found if path.endswith((".so", ".pyc")) or re.match("tests|docs|[.]", path)]


@pytest.mark.skipif(not HADOLINT.exists(), reason="needs hadolint, of the extra dev")
def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    done = subprocess.run([HADOLINT, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=WAIT_S)
    assert (done.stdout, done.returncode) == ("", 0)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[docker_image.Stage]:
    """The image, with a program in its working folder, as an image that is made from it has one."""
    folder = tmp_path_factory.mktemp("image")
    made = docker_image.build(ROOT / "Dockerfile", folder)
    (made.at("/srv/app") / "app.py").write_text(APP)
    yield made
    shutil.rmtree(folder)


class Container:
    """Runs an image as Docker does: its first process is number 1, and has a network of its own."""

    def __init__(self, image: docker_image.Stage, options: list[str]) -> None:
        self._image = image
        words = [word for name in ("ENTRYPOINT", "CMD") for word in docker_image.words(image.set[name])] + options
        own = ["unshare", "--mount", "--pid", "--net", "--fork", *image.command(words)]
        self.process = subprocess.Popen(own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def said(self, words: str) -> None:
        """Read the output up to a line with these words. Ends the container if none comes in time."""
        assert self.process.stdout is not None
        alarm = threading.Timer(WAIT_S, self.kill)
        alarm.start()
        lines = []
        while not lines or (words not in lines[-1] and lines[-1]):
            lines.append(self.process.stdout.readline())
        alarm.cancel()
        alarm.join()
        assert words in lines[-1], "".join(lines)

    @property
    def first(self) -> int:
        """The number of its first process, outside."""
        pid = self.process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())

    def enter(self, words: list[str], user: str | None = None) -> list[str]:
        """Return a command that runs words in the container, as `docker exec` does."""
        user, _, group = (user or self._image.user).partition(":")
        namespaces = ["--mount", "--pid", "--net", "--root", "--setuid", user, "--setgid", group]
        variables = [f"{name}={value}" for name, value in self._image.environment.items()]
        return ["nsenter", "--target", str(self.first), *namespaces, "env", "-i", *variables, *words]

    def health(self) -> subprocess.CompletedProcess[str]:
        found = re.fullmatch(r"(?:--\S+ )*CMD (.*)", self._image.set["HEALTHCHECK"])
        assert found is not None
        command = self.enter(docker_image.words(found[1]))
        return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)

    def stop(self) -> None:
        """Send the first process the signal that `docker stop` sends."""
        os.kill(self.first, signal.Signals[self._image.set["STOPSIGNAL"]])

    def kill(self) -> None:
        """End all processes of the container: they end with the first one."""
        with suppress(OSError, ValueError):  # it has ended already
            os.kill(self.first, signal.SIGKILL)


@contextmanager
def running(image: docker_image.Stage, options: list[str]) -> Iterator[Container]:
    container = Container(image, options)
    try:
        yield container
    finally:
        container.kill()
        container.process.communicate(timeout=WAIT_S)


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def builds(test: Any) -> Any:
    """Mark a test that builds the image."""
    can_build = pytest.mark.skipif(
        not docker_image.can_build(), reason="needs Linux, root, unshare, nsenter, and the right to mount overlays"
    )
    return pytest.mark.slow(can_build(test))


@builds
@pytest.mark.parametrize("options", [[], ["--workers=2"]], ids=["one process", "workers"])
def test_a_container_drains_when_it_is_stopped(image: docker_image.Stage, options: list[str]) -> None:
    with running(image, options) as container:
        container.said("serving Handler on tcp://0.0.0.0:7000")
        seen = status(container.first)
        assert (seen["Uid"].split(), seen["NSpid"].split()[-1]) == (["65534"] * 4, "1")
        command = container.enter(["python", "-c", CLIENT], user="0:0")
        with Started(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
            assert client.stdout is not None
            assert client.stdout.readline() == "ONE\n"
            container.stop()
            container.said("ending when 1 request is done")
            answer, _ = client.communicate("\n", timeout=WAIT_S)
        assert answer == "HELLO\n"
        assert container.process.wait(WAIT_S) == 0


@builds
def test_the_health_check_asks_the_server(image: docker_image.Stage) -> None:
    with running(image, []) as container:
        container.said("serving Handler on tcp://0.0.0.0:7000")
        health = container.health()
        assert health.returncode == 0, health.stderr
        assert json.loads(health.stdout)["entries"] == 0
    with running(image, ["--no-control"]) as container:
        container.said("serving Handler on tcp://0.0.0.0:7000")
        assert container.health().returncode == 3


@builds
def test_the_image_names_a_program_that_is_not_there(image: docker_image.Stage) -> None:
    program = image.at("/srv/app") / "app.py"
    text = program.read_text()
    program.unlink()
    try:
        with running(image, []) as container:
            container.said("app.py")
            assert container.process.wait(WAIT_S) == 2
    finally:
        program.write_text(text)


@builds
def test_the_image_of_the_page_serves(image: docker_image.Stage) -> None:
    """The page's image is made from ours: its steps run in ours."""
    [block] = blocks(PAGE, "dockerfile")
    first, *steps, (name, command) = docker_image.parsed(block.text)
    assert (first, name) == (("FROM", "reqtable"), "CMD")
    user, known = image.user, image.set["CMD"]
    for name, text in steps:
        if name == "USER":
            image.user = text
        elif name == "RUN":
            image.run(["/bin/sh", "-c", text])
        else:
            assert (name, text) == ("COPY", "app.py .")
    assert image.user == user
    image.set["CMD"] = command
    try:
        with running(image, []) as container:
            container.said("2 of 2 workers are ready")
    finally:
        image.set["CMD"] = known


def docker_commands() -> list[tuple[str, ...]]:
    """Return the words after `docker` of each command of the page."""
    assert {each.language for each in blocks(PAGE)} == {"console", "dockerfile"}
    typed = [each.words for block in blocks(PAGE, "console") for each in commands(block)]
    assert {words[0] for words in typed} == {"docker"}
    [stop] = re.findall(r"`docker (stop -.*?)`", text_of(PAGE))
    return [words[1:] for words in typed] + [tuple(stop.split())]


def test_the_page_asks_the_server_by_commands_that_exist() -> None:
    asked = [words[words.index("reqtable") + 1 :] for words in docker_commands() if words[0] == "exec"]
    assert len(asked) == 2
    for words in asked:
        check_command(words)


@pytest.mark.skipif(shutil.which("docker") is None, reason="needs the client of Docker")
def test_docker_knows_the_options_of_the_page() -> None:
    for command, *words in docker_commands():
        told = subprocess.run(["docker", command, "--help"], capture_output=True, text=True, timeout=WAIT_S)
        for word in words:
            assert not word.startswith("-") or word in told.stdout.split(), (command, word)
