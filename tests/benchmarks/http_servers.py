"""The HTTP servers of `servers`: a WSGI application, a file of 10 KiB, WebSockets, server-sent events.

Each is set as its users set it, without a log of requests, and has the same number of threads where it has any.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
QUEUE = 1024
THREADS = 4
HELLO = b"Hello"
FILE_BYTES = 10_240
FOLDER = Path(__file__).parent.parent.parent / "build" / "served"
LARGE_PIECE = b"x" * 40_000
LARGE_PIECES = 100

_FIELDS = [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(HELLO)))]
_ASGI_FIELDS = [(name.lower().encode(), value.encode()) for name, value in _FIELDS]


def hello(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    start_response("200 OK", [*_FIELDS])
    return [HELLO]


def hello_and_large(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
    """Answer with much, or take an upload; else as `hello`."""
    if environ["PATH_INFO"] == "/large":
        start_response("200 OK", [("Content-Length", str(len(LARGE_PIECE) * LARGE_PIECES))])
        return (LARGE_PIECE for _ in range(LARGE_PIECES))
    environ["wsgi.input"].read()
    return hello(environ, start_response)


async def hello_by_asgi(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [*_ASGI_FIELDS]})
    await send({"type": "http.response.body", "body": HELLO})


def listening() -> socket.socket:
    """Return a listening socket, after printing its port."""
    bound = socket.create_server((HOST, 0), backlog=QUEUE)
    print(bound.getsockname()[1], flush=True)
    return bound


def folder() -> str:
    """Return the folder with the file, after making it if there is none."""
    path = FOLDER / "page.html"
    if not path.exists() or path.stat().st_size != FILE_BYTES:
        FOLDER.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * FILE_BYTES)
    return str(FOLDER)


# -- reqtable ---------------------------------------------------------------------------------------------------------


def reqtable_serve(make: Callable[[], Any], dispatch: str | None = None) -> None:
    import reqtable

    config = reqtable.Config(
        pool=reqtable.PoolOptions(size=THREADS),
        greenlet=reqtable.GreenletOptions(suspend_all_sockets=True),  # as `reqtable wsgi` sets it
    )
    reqtable.serve(
        make(),
        f"tcp://{HOST}:0",
        dispatch=dispatch,
        config=config,
        on_listening=lambda names: print(names[0].rpartition(":")[2], flush=True),
    )


def wsgi(application: Callable[..., Any]) -> Any:
    from reqtable.http import wsgi_handler

    return wsgi_handler(application)


def files() -> Any:
    from reqtable.http import FileRequestHandler

    return type("Files", (FileRequestHandler,), {"root": folder()})


def websocket() -> Any:
    from reqtable.http import WebSocketHandler

    class Echo(WebSocketHandler):
        def on_message(self, message: str | bytes) -> None:
            assert isinstance(message, str)
            self.send_text(message)

    return Echo


def events() -> Any:
    from examples.events import Events

    Events.last[0] = 0  # the load knows the ids
    return Events


# -- others -----------------------------------------------------------------------------------------------------------


def gunicorn_gthread() -> None:
    from gunicorn.app.base import BaseApplication

    bound = listening()
    settings = {"bind": f"fd://{bound.fileno()}", "worker_class": "gthread", "threads": THREADS}

    class Application(BaseApplication):
        def load_config(self) -> None:
            for name, value in (settings | {"loglevel": "warning"}).items():
                self.cfg.set(name, value)

        def load(self) -> Any:
            return hello

    Application().run()


def waitress_serve() -> None:
    import waitress

    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # else it warns whenever no thread is free
    waitress.serve(hello, sockets=[listening()], threads=THREADS, _quiet=True)


def cheroot_serve() -> None:
    from cheroot.wsgi import Server

    server = Server((HOST, 0), hello, numthreads=THREADS, max=THREADS, request_queue_size=QUEUE)
    server.keep_alive_conn_limit = QUEUE  # it closes connections above ten
    server.prepare()
    print(server.bind_addr[1], flush=True)
    server.serve()


def uvicorn_serve(make: Callable[[], Any]) -> None:
    import uvicorn

    how = {"loop": "uvloop", "http": "httptools", "access_log": False, "log_level": "warning", "lifespan": "off"}
    uvicorn.Server(uvicorn.Config(make(), **how)).run(sockets=[listening()])


def starlette_files() -> Any:
    from starlette.applications import Starlette
    from starlette.routing import Mount
    from starlette.staticfiles import StaticFiles

    return Starlette(routes=[Mount("/", StaticFiles(directory=folder()))])


def http_server_files() -> None:
    """Serve with connections that are kept, as the others keep theirs."""
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    class Quiet(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = QUEUE

    with Server((HOST, 0), partial(Quiet, directory=folder())) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()


OURS: dict[str, dict[str, Callable[[], None]]] = {
    **{
        f"wsgi-{policy}": {
            "hello": partial(reqtable_serve, partial(wsgi, hello), policy),
            "hello-large": partial(reqtable_serve, partial(wsgi, hello_and_large), policy),
        }
        for policy in ("inline", "greenlet", "pool")
    },
    "http": {
        "file": partial(reqtable_serve, files),
        "websocket": partial(reqtable_serve, websocket),
        "events": partial(reqtable_serve, events),
    },
}
OTHERS: dict[str, tuple[str, dict[str, Callable[[], None]]]] = {
    "gunicorn-gthread": ("gunicorn", {"hello": gunicorn_gthread}),
    "waitress": ("waitress", {"hello": waitress_serve}),
    "cheroot": ("cheroot", {"hello": cheroot_serve}),
    "uvicorn": (
        "uvicorn",
        {
            "hello": partial(uvicorn_serve, lambda: hello_by_asgi),
            "file": partial(uvicorn_serve, starlette_files),
        },
    ),
    "http.server": ("http", {"file": http_server_files}),
}
BESIDE = {"uvicorn": ("uvloop", "httptools", "starlette")}  # what its servers here are made with
