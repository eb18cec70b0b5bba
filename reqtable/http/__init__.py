"""HTTP/1.1 on the table: handlers to derive from, files, WSGI applications, WebSockets."""

from reqtable.http.handler import HTTPRequestHandler, Reply, Request
from reqtable.http.head import BadRequest, Head
from reqtable.http.wants import head

__all__ = ["BadRequest", "HTTPRequestHandler", "Head", "Reply", "Request", "head"]
