"""How a server gets its dispatch policy: mix-ins, options, errors, and a change while it serves."""

from __future__ import annotations

import http.server
import logging
import os
import socketserver
from typing import Any

import pytest

import reqtable
from reqtable import Config, ConfigurationError
from reqtable.config import ForkOptions, PoolOptions, ThreadOptions
from tests.policies import ANY, StateWhere, Where, empty, where
from tests.support import Client, served, serving, wait_until

# -- the mix-ins ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixin", ["Threading", "Forking", "Table"])
def test_twelve_classes_are_predefined(mixin: str) -> None:
    for kind in ("TCPServer", "UDPServer", "UnixStreamServer", "UnixDatagramServer"):
        made = getattr(reqtable, mixin + kind)
        assert made.__mro__[1:3] == (getattr(reqtable, mixin + "MixIn"), reqtable.server.mixins._MixIn)  # type: ignore[attr-defined]
        assert issubclass(made, getattr(reqtable, kind))
        assert made.dispatch == {"Threading": "thread", "Forking": "fork", "Table": "greenlet"}[mixin]


@pytest.mark.parametrize("mixin", [reqtable.ThreadingMixIn, reqtable.ForkingMixIn, reqtable.TableMixIn])
def test_a_mix_in_goes_in_front_of_a_standard_server(mixin: Any) -> None:
    class Hello(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"%d" % os.getpid())

        def log_message(self, *args: Any) -> None:
            pass

    class Server(mixin, http.server.HTTPServer):  # type: ignore[misc]
        pass

    with serving(Server(ANY, Hello)) as server:
        client = Client(server.server_address).send(b"GET / HTTP/1.0\r\n\r\n")
        body = client.rest().rpartition(b"\r\n")[2]
        assert (int(body) == os.getpid()) == (mixin is not reqtable.ForkingMixIn)
        client.hang_up()
        empty(server)


def test_ours_goes_in_front_of_the_standard_librarys() -> None:
    class Both(reqtable.ThreadingMixIn, socketserver.ThreadingTCPServer):
        pass

    with serving(Both(ANY, Where)) as server, Client(server.server_address) as client:
        assert where(client)[0] == os.getpid()


# -- bad configuration ------------------------------------------------------------------------------------------------


def test_fork_without_fork_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "fork")
    with pytest.raises(ConfigurationError, match=r"this platform has no fork\(\)"):
        reqtable.TCPServer(ANY, Where, dispatch="fork")
    with pytest.raises(ConfigurationError, match=r"this platform has no fork\(\)"):
        reqtable.ForkingTCPServer(ANY, Where)


@pytest.mark.parametrize("made", [PoolOptions, ThreadOptions, ForkOptions])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "8"])
def test_counts_are_whole_numbers_above_0(made: Any, value: Any) -> None:
    with pytest.raises(ConfigurationError, match="must be a whole number above 0, not"):
        made(value)


def test_nothing_is_bound_when_a_policy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[Any] = []
    monkeypatch.setattr(reqtable.TCPServer, "server_bind", lambda self: bound.append(self))
    monkeypatch.setattr(http.server.HTTPServer, "server_bind", lambda self: bound.append(self))

    class Mixed(reqtable.TableMixIn, http.server.HTTPServer):
        pass

    for made in (reqtable.TCPServer, reqtable.ThreadingTCPServer, Mixed):
        for dispatch in ("nowhere", "executor"):
            with pytest.raises(ConfigurationError) as raised:
                made(ANY, Where, dispatch=dispatch)
            assert "\n" not in str(raised.value)
    assert bound == []
    logging.getLogger("reqtable").debug("nothing was bound")


def test_call_on_is_checked_when_the_server_is_made() -> None:
    with pytest.raises(ConfigurationError, match=r"^call_on: there is no executor 'nope'; there are \"thread\""):
        reqtable.TCPServer(ANY, Where, config=Config(call_on="nope"))


# -- a change while it serves -----------------------------------------------------------------------------------------


def test_a_former_configuration_goes_with_its_last_request() -> None:
    with served(StateWhere, "pool") as server:
        closed = []
        with Client(server.server_address) as client:
            where(client)
            former = server._policies
            close = former.close
            former.close = lambda wait, calls=False: (closed.append(wait), close(wait, calls))  # type: ignore[method-assign]
            server.engine.post(server.reconfigure, Config())
            where(client)
            assert not closed
            assert server._policies is not former
        empty(server)
        wait_until(server, lambda: bool(closed))
        idle = server._policies
        server.engine.post(server.reconfigure, Config())
        wait_until(server, lambda: server._policies is not idle)
        assert server._former == [], "one without requests goes at once"
