"""Every fenced block of README.md and docs/ is run, loaded or parsed, or has its reason here why it is not."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import pytest

import reqtable
from reqtable.config import Config, effective
from reqtable.control.api import ControlHandler
from tests.pages import (
    PAGES,
    ROOT,
    Block,
    Command,
    blocks,
    check_command,
    commands,
    importing,
    played,
    running,
    text_of,
    titled,
    write_files,
)
from tests.support import WAIT_S

pytest.importorskip("flask")

RUN_ELSEWHERE = {
    "README.md": "tests/test_control_commands.py plays its server and its client",
    "docs/tutorials/": "tests/test_tutorials.py reads each tutorial from top to bottom",
    "docs/how-to/outgrow-one-machine.md": "tests/test_outgrow_page.py runs each of its blocks",
    "docs/how-to/read-an-error.md": "tests/test_users_line.py compares its line of the log",
    "docs/how-to/start-a-handler.md": "tests/test_new.py types its commands",
    "docs/how-to/talk-to-a-server.md": "tests/test_talk.py types its command",
    "docs/how-to/use-types.md": "tests/test_types.py compares its wrong lines with mypy and pyright",
    "docs/how-to/run-in-docker.md": "tests/test_docker.py compares its commands with the image",
    "docs/how-to/run-under-systemd.md": "tests/test_systemd_units.py verifies its units",
}
NOT_RUN = {  # where a block begins: why it is not run here
    "worker 4711 was killed": "lines of a log; tests/test_takeover.py compares their words",
    "192.0.2.7:51422: Notes ended": "a line of a log; tests/test_takeover.py compares its words",
    "127.0.0.1:50234: a step of Report": "a line of a log; tests/test_gone.py compares its words",
    "call(quick) has waited": "a line of a log; tests/test_control_calls.py compares its words",
    "thread         reqtable-call_0": "the end of a detail; tests/test_control_commands.py compares its words",
    "handler  calls": "two columns; tests/test_control_commands.py compares their words",
    "127.0.0.1:50234 Notes done": "a line of a log; tests/test_serving.py compares its words",
    "reqtable top  Notes": "a screen; tests/test_top_screen.py compares screens",
    "$ tar -xzf": "it needs a release; tests/test_packaging.py makes one, and unpacks it",
    "gunicorn app:app": "commands of other servers",
    "ssh -N": "it needs another machine",
    "compat, testing": "a list of the floors; tests/test_layering.py checks them",
    "            listener readable": "a drawing",
}
OUTPUT_COMPARED = {  # pages with the output of commands that ask a server: the test that compares it
    "docs/how-to/deploy-without-a-cut.md": "tests/test_control_restarts.py",
    "docs/how-to/find-a-stuck-request.md": "tests/test_control_commands.py",
    "docs/how-to/find-a-stuck-worker.md": "tests/test_control_commands.py",
    "docs/how-to/read-the-figures.md": "tests/test_control_commands.py",
    "docs/how-to/run-several-workers.md": "tests/test_control_commands.py",
    "docs/how-to/save-a-request.md": "tests/test_control_commands.py",
    "docs/how-to/see-who-uses-the-server.md": "tests/test_control_commands.py",
}
RUN = ("python", "toml", "console", "sh")
OURS = [page for page in PAGES if not page.startswith(tuple(RUN_ELSEWHERE))]
YOURS = (ROOT / "examples" / "notes.py").read_text() + titled("docs/how-to/serve-wsgi.md", "program.py")


def ours(*languages: str) -> list[Block]:
    """Return the blocks that this module runs."""
    return [
        block
        for page in OURS
        for block in blocks(page, *languages)
        if not any(block.text.startswith(beginning) for beginning in NOT_RUN)
    ]


def named(values: list[Block]) -> list[object]:
    return [pytest.param(each, id=each.place) for each in values]


COMMANDS = [command for block in ours("console", "sh") for command in commands(block)]


# -- all blocks -------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """Take back what a page does to the loggers."""
    loggers = [each for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger)]
    before = [(each, each.level, list(each.handlers)) for each in (logging.root, *loggers)]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = [each for each in logger.handlers if each in handlers]


def test_no_block_escapes() -> None:
    """A block has a language that is run, or its reason in `NOT_RUN`; and each fence of a page is a block."""
    everything = [block for page in PAGES for block in blocks(page)]
    assert len(everything) > 100
    assert [block.place for block in ours() if block.language not in RUN] == []
    for beginning in NOT_RUN:
        assert any(block.text.startswith(beginning) for block in everything), f"no block begins with {beginning!r}"
    for beginning, reason in RUN_ELSEWHERE.items():
        pages = [page for page in PAGES if page.startswith(beginning)]
        assert pages, beginning
        for page in pages:
            assert Path(page).name in text_of(reason.split()[0]), f"{page}: {reason}"
    for page in PAGES:
        assert text_of(page).count("\n```") == 2 * len(blocks(page)), f"{page}: a fence is indented, or has no end"


@pytest.mark.parametrize("page", OURS)
def test_code_is_fenced(page: str) -> None:
    """Code that is only indented would escape the tests."""
    text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    for paragraph in re.split(r"\n\n+", text):
        assert not paragraph.startswith("    "), paragraph


# -- Python -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in OURS if any(not b.title for b in blocks(page, "python"))])
def test_the_python_of_a_page_runs(page: str, tmp_path: Path) -> None:
    with played(page, tmp_path) as names:
        assert names


FILES = [block for block in ours("python") if block.title]
PROGRAMS = [block for block in FILES if re.search(r"^(print|    print).*flush=True", block.text, re.M)]


@pytest.mark.parametrize("block", named([each for each in FILES if each not in PROGRAMS]))
def test_a_file_of_a_page_can_be_imported(block: Block, tmp_path: Path) -> None:
    write_files(block.page, tmp_path)
    if block.title.startswith("test_"):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", block.title]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=WAIT_S)
        assert done.returncode == 0, done.stdout
        return
    with importing(tmp_path):
        module = importlib.import_module(block.title.removesuffix(".py"))
        assert Path(str(module.__file__)).parent == tmp_path


@pytest.mark.parametrize("block", named(PROGRAMS))
def test_a_program_of_a_page_serves(block: Block, tmp_path: Path) -> None:
    """It prints its port."""
    if "import asyncore" in block.text and sys.version_info >= (3, 12):
        pytest.skip("asyncore and asynchat are not in this Python's standard library")
    with running(block.page, block.title, tmp_path) as (_, port):
        assert port


# -- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", named(ours("toml")))
def test_a_configuration_can_be_loaded(block: Block, tmp_path: Path) -> None:
    shown = tomllib.loads(block.text)
    if block.title == "pyproject.toml":
        assert set(shown) <= {"project", "tool"}
        return
    path = tmp_path / "reqtable.toml"
    path.write_text(block.text)
    config = Config.load(path)
    assert len(config.origins) == len(list(keys_of(shown))), "each key of it was read"


def keys_of(table: dict[str, object], path: str = "") -> Iterator[str]:
    """Yield the keys of a configuration. `arguments` of an executor is one key, and so is `names` of `[tls]`."""
    for name, value in table.items():
        if isinstance(value, dict) and name not in ("arguments", "names"):
            yield from keys_of(value, f"{path}{name}.")
        else:
            yield path + name


# -- commands ---------------------------------------------------------------------------------------------------------


def of(program: str, only: Callable[[Command], bool] = bool) -> list[object]:
    """Return the commands that run a program."""
    return [
        pytest.param(each, id=f"{each.block.place} {' '.join(each.words[:3])}")
        for each in COMMANDS
        if each.words[0] == program and only(each)
    ]


def test_no_command_escapes() -> None:
    assert {each.words[0] for each in COMMANDS} == {"reqtable", "curl", "pip", "kill", "python", "mkdir", "echo"}


@pytest.mark.parametrize("command", of("reqtable"))
def test_a_command_is_one(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name, its options and its values are those of the command line."""
    monkeypatch.chdir(tmp_path)
    prepare(command.block.page, tmp_path)
    check_command(command.words[1:])


def prepare(page: str, folder: Path) -> None:
    """Write the files of a page, and those that pages take for granted: your own server, a folder, a record."""
    (folder / "app.py").write_text(YOURS)
    (folder / "site").mkdir(exist_ok=True)
    (folder / "notes-1.record").write_bytes(b"")
    write_files(page, folder)


def prints(command: Command) -> bool:
    """Return whether the page shows the output of a command that asks no server."""
    return command.words[1] in ("check", "config", "states") and command.output != ""


def test_no_output_escapes() -> None:
    pages = {each.block.page for each in COMMANDS if each.output and not prints(each)}
    assert pages == set(OUTPUT_COMPARED)
    for page, test in OUTPUT_COMPARED.items():
        assert Path(page).stem in text_of(test), page


@pytest.mark.parametrize("command", of("reqtable", only=prints))
def test_a_command_prints_its_output(command: Command, tmp_path: Path) -> None:
    prepare(command.block.page, tmp_path)
    words = [sys.executable, "-m", *command.words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=WAIT_S)
    assert done.stdout == command.output


def is_started(command: Command) -> bool:
    """Return whether a command serves, needs no root, and needs no certificate."""
    return command.words[1] in ("serve", "http", "wsgi") and not {"--user", "tls://0.0.0.0:4433"} & {*command.words}


@pytest.mark.parametrize("command", of("reqtable", only=is_started))
def test_a_server_starts(command: Command, tmp_path: Path) -> None:
    """It starts as it is typed, but at free addresses."""
    prepare(command.block.page, tmp_path)
    (tmp_path / "hello.py").write_text(titled("docs/how-to/serve-wsgi.md", "hello.py"))
    words = [re.sub(r"tcp://[\d.]+:\d+", "tcp://127.0.0.1:0", word) for word in command.words[1:]]
    words = [re.sub(r"(unix://)?/(tmp|run/app)(?=/)", rf"\g<1>{tmp_path}", word) for word in words]
    if "--bind" not in words:
        words += ["--bind", "tcp://127.0.0.1:0"]
    notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notified.bind(str(tmp_path / "notified"))
    environment = {**os.environ, **dict(command.variables), "XDG_RUNTIME_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment["NOTIFY_SOCKET"] = str(tmp_path / "notified")
    process = subprocess.Popen(
        [sys.executable, "-m", "reqtable", *words],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_ready(notified)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=WAIT_S)
        assert process.returncode == 0, printed
    finally:
        notified.close()
        process.kill()
        process.communicate()


def wait_ready(notified: socket.socket) -> None:
    """Wait until a server tells its service manager that it is ready (sd_notify(3))."""
    notified.settimeout(WAIT_S)
    while b"READY=1" not in notified.recv(4096):
        pass


ROUTES = {
    (method, re.sub(r"\{\w+\}", r"[^/]+", path))
    for name in dir(ControlHandler)
    for method, path in getattr(getattr(ControlHandler, name), "routes", ())
}


@pytest.mark.parametrize("command", of("curl"))
def test_a_url_is_one_of_the_control_api(command: Command) -> None:
    words = command.words
    (path,) = [word.removeprefix("http://reqtable").partition("?")[0] for word in words if word.startswith("http:")]
    method = words[words.index("-X") + 1] if "-X" in words else "POST" if "-d" in words else "GET"
    assert any(method == each and re.fullmatch(pattern, path) for each, pattern in ROUTES)


@pytest.mark.parametrize("command", of("pip"))
def test_an_extra_exists(command: Command) -> None:
    assert command.words[1] == "install"
    extras = importlib.metadata.metadata("reqtable").get_all("Provides-Extra") or []
    assert {extra for word in command.words for extra in re.findall(r"reqtable\[(\w+)\]", word)} <= {*extras}


@pytest.mark.parametrize("command", of("kill"))
def test_a_signal_exists(command: Command) -> None:
    assert hasattr(signal, f"SIG{command.words[1].removeprefix('-')}")


# -- names ------------------------------------------------------------------------------------------------------------


def test_the_keys_that_pages_name_exist() -> None:
    known = {name for name, _, _ in effective(Config())}
    for page in OURS:
        for section, key in re.findall(r"`\[(\w+)\] (\w+)", text_of(page)):
            assert f"{section}.{key}" in known, f"{page}: [{section}] {key}"


def test_the_how_to_pages_name_every_limit_of_requests() -> None:
    of_the_loop = {"accepts_per_pass", "expiries_per_pass", "steps_per_pass", "pass_bytes", "inbox_max"}
    of_the_loop |= {"recv_bytes", "send_bytes", "accept_pause_s"}
    text = "".join(text_of(page) for page in OURS if "how-to" in page)
    assert {each.name for each in fields(reqtable.Limits)} - of_the_loop - {*re.findall(r"\w+", text)} == set()


def test_the_defaults_of_limits_on_pages_are_those_of_the_code() -> None:
    for page in ("docs/how-to/set-deadlines.md",):
        rows = re.findall(r"^\| .*?`(\w+_s)`.*?\| ([\d,.]+|none)(?: s)? \|$", text_of(page), re.MULTILINE)
        assert len(rows) > 8
        for name, shown in rows:
            default = getattr(reqtable.Limits(), name)
            assert default == (float("inf") if shown == "none" else float(shown)) or (shown == "none" and not default)
