"""Every command, configuration and program of docs/how-to/outgrow-one-machine.md runs."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from examples.cluster.stamps import Stamps, mint
from reqtable import Config, TCPServer
from reqtable.testing import Client as Script
from reqtable.testing import exercise
from tests.pages import blocks, commands, text_of
from tests.service import Service
from tests.support import WAIT_S
from tests.test_cluster_example import needs_cluster

ROOT = Path(__file__).parent.parent
PAGE = "docs/how-to/outgrow-one-machine.md"
EXAMPLE = ROOT / "examples" / "cluster"


COMMANDS = [command.words for block in blocks(PAGE, "sh") for command in commands(block)]
SERVES = [words[2:] for words in COMMANDS if words[:2] == ("reqtable", "serve")]
MODULES = [words[2:] for words in COMMANDS if words[:2] == ("python", "-m")]
_, MEASURED, MODELLED = blocks(PAGE, "text")


def test_each_command_is_run_by_one_of_these_tests() -> None:
    assert len(SERVES) + len(MODULES) == len(COMMANDS) == 5
    assert [words[0] for words in MODULES] == [
        "examples.cluster",
        "examples.cluster.load",
        "examples.cluster.simulated",
    ]
    # tests/test_cluster_example.py runs the first of these
    assert {block.language for block in blocks(PAGE)} == {"python", "sh", "text", "toml"}


@pytest.mark.parametrize("words", SERVES)
def test_the_servers_of_the_page_serve(words: tuple[str, ...]) -> None:
    handler, bind, where, *others = words
    assert bind == "--bind"
    with Service(*others, workers=None, handler=handler, bind=re.sub(r":\d+$", ":0", where)) as service:
        assert service.ask("ping") == "pong"
        assert service.ask("mint 8 a text") == str(mint(8, b"a text"))
        service.signal(signal.SIGTERM)
        assert service.wait() == 0


def test_the_program_of_the_page_mints() -> None:
    [program] = blocks(PAGE, "python")
    made: dict[str, type] = {"__name__": __name__}
    exec(compile(program.text, "outgrow-one-machine.md", "exec"), made)
    exercise(made["Minting"], Script().send(b"a text\n").expect(b"%d\n" % mint(16, b"a text")))


def test_the_configurations_of_the_page_are_loaded(tmp_path: Path) -> None:
    processes, cluster = blocks(PAGE, "toml")
    file = tmp_path / "reqtable.toml"
    file.write_text(processes.text)
    config = Config.load(file)
    with TCPServer(("127.0.0.1", 0), Stamps, config=config):
        assert config.call_on == "process"
    assert cluster.text in (EXAMPLE / "cluster.toml").read_text()
    assert Config.load(EXAMPLE / "cluster.toml").executors["cluster"].factory == "examples.cluster.executor:Cluster"


def test_the_page_names_what_is_in_the_configuration_of_haproxy() -> None:
    text = (EXAMPLE / "haproxy.cfg").read_text()
    for words in ("balance leastconn", "send-proxy-v2", "tcp-check", "retries 3", "option redispatch 1"):
        assert f"`{words}`" in text_of(PAGE)
        assert words in text


@pytest.mark.parametrize("words", MODULES[2:])
def test_the_model_of_the_page_runs(words: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *words, "--clients", "4", "--each", "1"],
        cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S, check=True,
    )  # fmt: skip
    heading, *lines = done.stdout.splitlines()
    assert heading.split() == ["workers", "per", "s", "p50", "ms", "p99", "ms"]
    assert [int(line.split()[0]) for line in lines] == [1, 2, 4, 8, 16, 32, 64]
    assert lines[2].split()[1:] == lines[6].split()[1:], "four clients have no use for more than four workers"


@pytest.mark.slow
@pytest.mark.parametrize("words", MODULES[2:])
def test_the_figures_of_the_model_are_those_of_the_page(words: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == MODELLED.text


@needs_cluster
@pytest.mark.slow
@pytest.mark.parametrize("words", MODULES[1:2])
def test_the_measurement_of_the_page_runs(words: tuple[str, ...]) -> None:
    pytest.importorskip("distributed")
    done = subprocess.run(
        [sys.executable, "-m", *words, "--clients", "2", "--rounds", "1"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    *heading, _, _, _ = done.stdout.splitlines()
    assert MEASURED.text.startswith("\n".join(heading))
    lines = done.stdout.splitlines()[2:]
    assert [int(line.split()[0]) for line in lines] == [1, 2, 4]
    assert all(float(word) > 0 for line in lines for word in line.split())
