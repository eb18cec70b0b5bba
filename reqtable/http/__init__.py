"""HTTP/1.1 on the table: handlers to derive from, files, WSGI applications, WebSockets."""

from reqtable.http.events import encode_event
from reqtable.http.handler import HTTPRequestHandler
from reqtable.http.head import BadRequest, Head
from reqtable.http.messages import Reply, Request
from reqtable.http.routes import route
from reqtable.http.wants import head
from reqtable.http.wsgi import WSGIHandler, wsgi_handler

__all__ = [
    "BadRequest",
    "HTTPRequestHandler",
    "Head",
    "Reply",
    "Request",
    "WSGIHandler",
    "encode_event",
    "head",
    "route",
    "wsgi_handler",
]
