"""Nothing here knows of reqtable: test_server_classes.py serves these classes, and this function."""

import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

print("imported", file=sys.stderr)


def where() -> bytes:
    return b"greenlet" if threading.current_thread() is threading.main_thread() else b"thread"


class Handler(BaseHTTPRequestHandler):
    def setup(self) -> None:
        print("begun", file=sys.stderr, flush=True)
        super().setup()

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(where())


class Server(HTTPServer):
    def __init__(self, address, handler=Handler):
        super().__init__(address, handler)


class Broken(HTTPServer):
    def __init__(self, address):
        super().__init__(address, Handler)
        raise LookupError("no such thing")


class SiteHandler(WSGIRequestHandler):
    def setup(self) -> None:
        print("begun", file=sys.stderr, flush=True)
        super().setup()


def application(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [where()]


def site(address):
    server = WSGIServer(address, SiteHandler, bind_and_activate=False)
    server.set_app(application)
    return server


def bound(address):
    return HTTPServer(("127.0.0.1", 0), Handler)


def nothing(address):
    HTTPServer(address, Handler, bind_and_activate=False).server_close()


made = HTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
