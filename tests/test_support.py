"""The helpers of tests/support.py that end programs, read them, and keep ports."""

from __future__ import annotations

import io
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import Client, Started, lines_before

SERVER = "import sys; print('serving', flush=True); sys.stdin.read()"
TESTS = Path(__file__).parent


def started() -> Started[str]:
    """Start a program that ends when its standard input does."""
    return Started([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_program_is_killed_if_its_test_fails() -> None:
    with pytest.raises(AssertionError, match="the test fails"), started() as process:
        raise AssertionError("the test fails")
    assert process.returncode == -signal.SIGKILL


def test_a_program_ends_by_itself_if_its_test_does_not_fail() -> None:
    with started() as process:
        assert process.stdout is not None
        assert lines_before("serving\n", process.stdout) == []
    assert process.returncode == 0


def test_no_test_waits_for_a_program_after_a_failure() -> None:
    waits = [path for path in TESTS.glob("*.py") if re.search(r"^ *with subprocess\.Popen\(", path.read_text(), re.M)]
    assert waits == [], "use Started"


def test_an_output_that_ends_early_is_told() -> None:
    assert lines_before("c\n", io.StringIO("a\nb\nc\nd\n")) == ["a\n", "b\n"]
    with pytest.raises(AssertionError, match="the output ended without 'c"):
        lines_before("c\n", io.StringIO("a\nb\n"))


def test_a_reserved_port_refuses_until_a_server_binds_it(unused_port: int) -> None:
    with pytest.raises(ConnectionRefusedError):
        Client(("127.0.0.1", unused_port))
    with socket.create_server(("127.0.0.1", unused_port)), Client(("127.0.0.1", unused_port)):
        pass
