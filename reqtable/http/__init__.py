"""HTTP/1.1 on the table: handlers to derive from, files, WSGI applications, WebSockets."""

from reqtable.http.async_websocket_handler import AsyncWebSocketHandler
from reqtable.http.events import encode_event
from reqtable.http.files import FileRequestHandler
from reqtable.http.frames import WebSocketClosed, WebSocketError
from reqtable.http.handler import HTTPRequestHandler
from reqtable.http.head import BadRequest, Head
from reqtable.http.messages import Reply, Request
from reqtable.http.routes import route
from reqtable.http.wants import head
from reqtable.http.websocket import WebSocket
from reqtable.http.websocket_handler import WebSocketHandler
from reqtable.http.ws_messages import ws_message
from reqtable.http.wsgi import WSGIHandler, wsgi_handler

__all__ = [
    "AsyncWebSocketHandler",
    "BadRequest",
    "FileRequestHandler",
    "HTTPRequestHandler",
    "Head",
    "Reply",
    "Request",
    "WSGIHandler",
    "WebSocket",
    "WebSocketClosed",
    "WebSocketError",
    "WebSocketHandler",
    "encode_event",
    "head",
    "route",
    "ws_message",
    "wsgi_handler",
]
