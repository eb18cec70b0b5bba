"""TCP keep-alive: for which accepted connections the kernel probes a silent client, and when this changes."""

from __future__ import annotations

import signal
import socket
from pathlib import Path
from typing import Any

import pytest

import reqtable
from examples.echo import AsyncEcho, StateEcho
from reqtable import Config, ConfigurationError, Limits
from reqtable.run.endpoints import find_endpoints
from reqtable.run.listening import make_server, open_server
from tests.service import Service
from tests.support import Client, serving, wait_until

ANY = ("127.0.0.1", 0)


def probing(connection: socket.socket) -> tuple[int, ...] | None:
    """Return the seconds before the first probe, the seconds between probes, and their number; None without probes."""
    if not connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE):
        return None
    options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    return tuple(connection.getsockopt(socket.IPPROTO_TCP, option) for option in options)


class Probing(reqtable.StreamRequestHandler):
    def handle(self) -> None:
        for _ in self.rfile:
            self.wfile.write(b"%a\n" % (probing(self.connection),))


def configured(seconds: float | None) -> Config:
    return Config(limits=Limits(keepalive_s=seconds))


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "thread", "pool", "fork"])
def test_every_policy_accepts_connections_that_are_probed(dispatch: str) -> None:
    with serving(reqtable.TCPServer(ANY, Probing, dispatch=dispatch, config=configured(60))) as server:
        client = Client(server.server_address)
        assert client.ask(b"\n") == b"(60, 15, 4)\n"
        client.hang_up()


@pytest.mark.parametrize("handler", [StateEcho, AsyncEcho])
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_every_style_accepts_connections_that_are_probed(handler: Any, family: int) -> None:
    made = type("Server", (reqtable.TCPServer,), {"address_family": family})
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    with serving(made((host, 0), handler, config=configured(0.5))) as server:
        with Client(server.server_address, family) as client:
            assert client.ask(b"a\n") == b"a\n"
            [entry] = server.table
            assert probing(entry.transport.request) == (1, 1, 1)


@pytest.mark.parametrize("seconds", [1, 2.5, 7, 10, 32_767])
def test_a_lost_client_is_noticed_after_about_twice_the_time(seconds: float) -> None:
    with reqtable.TCPServer(ANY, StateEcho, config=configured(seconds)) as server:
        server._keep_alive()
        found = probing(server.socket)
        assert found is not None
        idle_s, interval_s, probes = found
        assert 0 <= idle_s - seconds < 1
        assert abs(interval_s * probes - idle_s) <= max(1, 0.2 * idle_s)


def test_without_the_limit_a_programs_own_choice_holds() -> None:
    with serving(reqtable.TCPServer(ANY, Probing)) as server, Client(server.server_address) as client:
        assert client.ask(b"\n") == b"None\n"
    with reqtable.TCPServer(ANY, Probing) as server:
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        server.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 9)
        with serving(server), Client(server.server_address) as client:
            server.engine.post(server.reconfigure, configured(None))
            assert client.ask(b"\n").startswith(b"(9, ")


def test_a_reload_holds_for_new_connections() -> None:
    with serving(reqtable.TCPServer(ANY, Probing, dispatch="greenlet")) as server:
        for seconds, answer in [(20, b"(20, 5, 4)\n"), (3, b"(3, 1, 3)\n"), (None, b"None\n")]:
            with Client(server.server_address) as former:
                before = former.ask(b"\n")
                server.engine.post(server.reconfigure, configured(seconds))
                wait_until(server, lambda seconds=seconds: server.engine.limits.keepalive_s == seconds)  # type: ignore[misc]
                with Client(server.server_address) as client:
                    assert client.ask(b"\n") == answer
                assert former.ask(b"\n") == before


def test_what_is_no_tcp_socket_is_left_alone(tmp_path: Path) -> None:
    config = configured(5)
    servers = [
        reqtable.UnixStreamServer(str(tmp_path / "s"), StateEcho, config=config),
        reqtable.UnixDatagramServer(str(tmp_path / "d"), StateEcho, config=config),
        reqtable.UDPServer(ANY, StateEcho, config=config),
    ]
    for server in servers:
        with serving(server):
            server.engine.post(server.reconfigure, configured(6))
            wait_until(server, lambda server=server: server.engine.limits.keepalive_s == 6)  # type: ignore[misc]
            assert not server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_a_socket_that_is_passed_on_is_told_when_it_is_opened() -> None:
    with socket.create_server(ANY) as listening:
        [place] = find_endpoints([f"fd://{listening.fileno()}"])
        with make_server(place, StateEcho, None, configured(40)) as server:
            open_server(server)
            assert probing(listening) == (40, 10, 4)
            server.reconfigure(configured(None))
            assert probing(listening) is None


def test_workers_that_are_replaced_take_the_new_limit(tmp_path: Path) -> None:
    path = tmp_path / "reqtable.toml"
    path.write_text("[limits]\nkeepalive_s = 30\n")
    with socket.create_server(ANY) as listening:
        passed = ("--config", str(path), "--bind", f"fd://{listening.fileno()}")
        with Service(*passed, pass_fds=(listening.fileno(),)) as service:
            assert probing(listening) == (30, 8, 4)
            service.wait_for("2 of 2 workers are ready")
            path.write_text("")
            service.signal(signal.SIGHUP)
            service.wait_for("the configuration was read again")
            service.wait_for("2 of 2 workers are ready", 2)
            assert probing(listening) is None


@pytest.mark.parametrize("seconds", [0, -1, "5", True, 32_768, float("inf"), float("nan")])
def test_what_no_kernel_takes_is_refused(seconds: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keepalive_s must be "):
        Limits(keepalive_s=seconds)
    path = tmp_path / "reqtable.toml"
    path.write_text("[limits]\nkeepalive_s = 40_000\n")
    with pytest.raises(ConfigurationError, match=":2: keepalive_s must be at most 32767, not 40000"):
        Config.load(path)


def test_a_client_that_connects_before_anything_is_served_is_probed() -> None:
    server = reqtable.TCPServer(ANY, Probing, dispatch="greenlet", config=configured(60))
    with Client(server.server_address) as client, serving(server):
        assert client.ask(b"\n") == b"(60, 15, 4)\n"
