"""Unmodified client libraries in blocking handlers under `suspend_all_sockets`: only the request waits."""

from __future__ import annotations

import http.client
import http.server
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pg8000.dbapi
import pytest
import redis
import requests

import reqtable
from reqtable import Config, GreenletOptions, TLSOptions
from tests.certificates import TLSClient, write_certificate
from tests.databases import postgresql_server, redis_server
from tests.support import Client, serving

ANY = ("127.0.0.1", 0)
GREENLET = GreenletOptions(suspend_all_sockets=True)
ON = Config(dispatch="greenlet", greenlet=GREENLET)


class Server(reqtable.TCPServer):
    request_queue_size = 1024


def seconds_for(handler: Any, clients: int, answer: bytes) -> float:
    """Return the time in which a server answers so many clients, who all ask at once."""
    threads = set()

    class Handler(handler):  # type: ignore[misc]
        def handle(self) -> None:
            threads.add(threading.get_ident())
            self.rfile.readline()
            super().handle()

    with serving(Server(ANY, Handler, config=ON)) as server:
        connected = [Client(server.server_address) for _ in range(clients)]
        begun = time.monotonic()
        for client in connected:
            client.send(b"begin\n")
        answers = {client.rest() for client in connected}
        took = time.monotonic() - begun
        for client in connected:
            client.close()
    assert answers == {answer}
    assert len(threads) == 1
    return took


@pytest.mark.parametrize("shared", [False, True], ids=["a connection each", "a shared pool"])
def test_two_hundred_handlers_wait_for_redis_at_once(shared: bool) -> None:
    with redis_server() as path:
        pool = redis.ConnectionPool(redis.UnixDomainSocketConnection, path=path, max_connections=300)

        class Handler(reqtable.StreamRequestHandler):
            def handle(self) -> None:
                if shared:
                    told = redis.Redis(connection_pool=pool).blpop(["empty"], 0.2)
                else:
                    with redis.Redis(unix_socket_path=path) as own:
                        told = own.blpop(["empty"], 0.2)
                self.wfile.write(repr(told).encode())

        took = seconds_for(Handler, 200, b"None")
        pool.disconnect()
    assert took < 5  # half a second on a quiet machine; one after the other they would take 40


def test_fifty_handlers_wait_for_postgresql_at_once() -> None:
    with postgresql_server() as path:

        class Handler(reqtable.StreamRequestHandler):
            def handle(self) -> None:
                # ssl_context=False, because reading the system's certificates takes 20 ms
                own = pg8000.dbapi.connect("postgres", unix_sock=path, ssl_context=False)
                cursor = own.cursor()
                cursor.execute("select 42, pg_sleep(0.2)")
                self.wfile.write(repr(cursor.fetchall()[0][0]).encode())
                own.close()

        took = seconds_for(Handler, 50, b"42")
    assert took < 5  # 0.4 s on a quiet machine; one after the other they would take 10


def test_handlers_of_one_server_talk_by_redis() -> None:
    """One publishes what the other waits for."""
    with redis_server() as path:

        class Handler(reqtable.StreamRequestHandler):
            def handle(self) -> None:
                with redis.Redis(unix_socket_path=path) as own:
                    if self.rfile.readline() == b"publish\n":
                        while not own.publish("news", "hello"):
                            time.sleep(0.01)
                        return
                    with own.pubsub() as subscribed:
                        subscribed.subscribe("news")
                        while (message := subscribed.get_message(timeout=20)) and message["type"] != "message":
                            pass
                        assert message is not None
                        self.wfile.write(message["data"])
                        assert subscribed.get_message(timeout=0.01) is None

        with serving(Server(ANY, Handler, config=ON)) as server:
            with Client(server.server_address) as subscriber, Client(server.server_address) as publisher:
                subscriber.send(b"subscribe\n")
                publisher.send(b"publish\n")
                assert publisher.rest() == b""
                assert subscriber.rest() == b"hello"


def by_urllib(url: str) -> bytes:
    with urllib.request.urlopen(url) as answer:
        return answer.read()  # type: ignore[no-any-return]


def by_http_client(url: str) -> bytes:
    own = http.client.HTTPConnection(url.split("/")[2])
    try:
        own.request("GET", "/inner")
        return own.getresponse().read()
    finally:
        own.close()


def by_requests(url: str) -> bytes:
    with requests.Session() as session:
        assert session.get(url).content == b"inner"
        return session.get(url, timeout=10).content  # on the connection that was kept


@pytest.mark.parametrize("fetch", [by_urllib, by_http_client, by_requests])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_handler_calls_its_own_server(fetch: Any, host: str) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = b"inner" if self.path == "/inner" else fetch(f"http://{host}:{server.server_address[1]}/inner")
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    class HTTPServer(reqtable.TableMixIn, http.server.HTTPServer):
        pass

    with serving(HTTPServer(ANY, Handler, config=ON)) as server:
        assert by_urllib(f"http://127.0.0.1:{server.server_address[1]}/") == b"inner"


def test_a_handler_calls_its_own_server_by_tls(tmp_path: Path) -> None:
    authority = tmp_path / "ca.pem"
    config = Config("greenlet", greenlet=GREENLET, tls=TLSOptions(cert=write_certificate(tmp_path)))

    class Handler(reqtable.StreamRequestHandler):
        def handle(self) -> None:
            path = self.rfile.readline().split()[1]
            while self.rfile.readline().strip():
                pass
            body = b"inner"
            if path == b"/outer":
                url = f"https://localhost:{server.server_address[1]}/inner"
                body = requests.get(url, verify=str(authority), timeout=10).content
            self.wfile.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + body)

    with serving(Server(ANY, Handler, config=config)) as server:
        with TLSClient(server.server_address) as client:
            assert client.send(b"GET /outer HTTP/1.1\r\n\r\n").rest().endswith(b"\r\n\r\ninner")
