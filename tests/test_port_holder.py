"""The process that has a port is named where a bind fails."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from reqtable.net.port_holder import mend_of_use
from tests.support import Started

UNKNOWN = ": stop what uses it, or choose another one"
BIND = """
import socket, sys
family, kind, host, v6only = sys.argv[1:]
with socket.socket(getattr(socket, family), getattr(socket, kind)) as own:
    if family == "AF_INET6":
        own.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(v6only))
    own.bind((host, 0))
    if kind == "SOCK_STREAM":
        own.listen()
    print(own.getsockname()[1], flush=True)
    sys.stdin.read()
"""

pytestmark = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="only Linux tells")


@contextmanager
def holding(family: str, kind: str, host: str, v6only: bool = False) -> Iterator[tuple[str, int]]:
    """Have another process take any port. Yields the mend that names the process, and the port."""
    command = [sys.executable, "-c", BIND, family, kind, host, str(int(v6only))]
    with Started(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        port = int(other.stdout.readline())
        name = Path(f"/proc/{other.pid}/comm").read_text().rstrip()
        yield f" by {name} (process {other.pid}): stop it, or choose another one", port
        other.communicate("")


@pytest.mark.parametrize("kind", ["SOCK_STREAM", "SOCK_DGRAM"])
@pytest.mark.parametrize(
    ("family", "host", "collide", "others"),
    [
        ("AF_INET", "127.0.0.1", ["127.0.0.1", "0.0.0.0", "::", "::ffff:127.0.0.1"], ["127.0.0.2", "::1"]),
        ("AF_INET", "0.0.0.0", ["127.0.0.1", "0.0.0.0", "::"], ["::1"]),
        ("AF_INET6", "::1", ["::1", "::"], ["127.0.0.1", "0.0.0.0"]),
        ("AF_INET6", "::", ["::1", "::", "127.0.0.1", "0.0.0.0"], []),
    ],
)
def test_the_process_with_which_a_bind_collides_is_named(
    kind: str, family: str, host: str, collide: list[str], others: list[str]
) -> None:
    with holding(family, kind, host) as (named, port):
        kinds = {each: int(getattr(socket, each)) for each in ("SOCK_STREAM", "SOCK_DGRAM")}
        own = kinds.pop(kind)
        assert {each: mend_of_use(own, (each, port)) for each in collide} == dict.fromkeys(collide, named)
        assert [each for each in others if mend_of_use(own, (each, port)) == named] == []
        [other] = kinds.values()
        assert mend_of_use(other, (host, port)) != named, "the ports of TCP and of UDP are others"


def test_a_socket_of_the_same_family_is_the_one_that_collides() -> None:
    with holding("AF_INET6", "SOCK_STREAM", "::", v6only=True) as (_, port), socket.socket() as own:
        own.bind(("127.0.0.1", port))
        own.listen()
        assert mend_of_use(socket.SOCK_STREAM, ("127.0.0.1", port)) == " by this process itself: choose another one"


def test_of_several_sockets_the_one_that_listens_is_meant() -> None:
    with holding("AF_INET", "SOCK_STREAM", "127.0.0.1") as (named, port):
        with socket.create_connection(("127.0.0.1", port)):
            assert mend_of_use(socket.SOCK_STREAM, ("127.0.0.1", port)) == named


def test_nobody_is_named_who_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mend_of_use(socket.SOCK_STREAM, "/run/x.sock") == UNKNOWN
    with holding("AF_INET", "SOCK_STREAM", "127.0.0.1") as (named, port):
        address = ("127.0.0.1", port)
        assert mend_of_use(socket.SOCK_STREAM, address) == named
        with monkeypatch.context() as patch:
            patch.setattr(os, "listdir", lambda _: [])  # another user's descriptors are not shown
            assert mend_of_use(socket.SOCK_STREAM, address) == UNKNOWN
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_text", lambda _: "sl local_address\nwith columns that are not known\n")
            assert mend_of_use(socket.SOCK_STREAM, address) == UNKNOWN
