"""A Redis server and a PostgreSQL server for tests: each in a folder of its own, on a Unix socket."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import WAIT_S


def program(name: str, *folders: Path) -> str:
    """Return the path of a server program, or skip the test if it is not installed. CI installs all of them."""
    path = shutil.which(name) or next((str(each / name) for each in folders if (each / name).exists()), None)
    if path is None:
        pytest.skip(f"the server program {name} is not installed")
    return path


@contextlib.contextmanager
def redis_server() -> Iterator[str]:
    """Run a Redis server. Yields the path of its Unix socket."""
    command = program("redis-server")
    with folder() as place:
        path = str(place / "redis.sock")
        options = ["--port", "0", "--unixsocket", path, "--save", "", "--dir", str(place), "--maxclients", "1000"]
        with running([command, *options], lambda: answers(path, b"PING\r\n", b"+PONG")):
            yield path


@contextlib.contextmanager
def postgresql_server() -> Iterator[str]:
    """Run a PostgreSQL server that trusts its user `postgres`. Yields the path of its Unix socket."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    initdb, postgres = program("initdb", *folders), program("postgres", *folders)
    # PostgreSQL refuses to run as root.
    identity: dict[str, Any] = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}
    with folder(**identity) as place:
        data = str(place / "data")
        make = [initdb, "--pgdata", data, "--username", "postgres", "--auth", "trust", "--no-sync", "--locale", "C"]
        subprocess.run(make, check=True, stdout=subprocess.DEVNULL, cwd=place, **identity)
        command = [postgres, "-D", data, "-k", str(place), "-c", "listen_addresses=", "-c", "fsync=off"]
        path = str(place / ".s.PGSQL.5432")
        ssl_request = b"\0\0\0\10\4\322\26\57"
        with running(command, lambda: answers(path, ssl_request, b"N"), cwd=place, **identity):
            yield path


@contextlib.contextmanager
def folder(user: str | None = None, group: str | None = None) -> Iterator[Path]:
    """Make a folder with a short path, because the path of a Unix socket has at most 107 bytes."""
    place = Path(tempfile.mkdtemp(prefix="reqtable-", dir="/tmp"))
    try:
        if user is not None:
            shutil.chown(place, user, group)
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def running(command: list[str], is_ready: Callable[[], bool], **options: Any) -> Iterator[None]:
    """Run a server program until the end of the block."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, **options)
        try:
            until = time.monotonic() + WAIT_S
            while not is_ready():
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise AssertionError(f"{command[0]} does not serve:\n{log.read().decode(errors='replace')}")
                time.sleep(0.02)  # nothing tells when another program listens
            yield
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(WAIT_S)


def answers(path: str, question: bytes, answer: bytes) -> bool:
    """Return whether a server at that path answers the question."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(WAIT_S)
        try:
            sock.connect(path)
            sock.sendall(question)
            return sock.recv(100).startswith(answer)
        except OSError:
            return False
