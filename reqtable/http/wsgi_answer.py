"""The head of an application's answer: what the application has said, and what the connection needs."""

from __future__ import annotations

from reqtable.http.answer import date
from reqtable.http.head import Head
from reqtable.http.messages import Reply
from reqtable.http.wsgi_call import ApplicationCall


def begin(reply: Reply, call: ApplicationCall, head: Head, may_keep: bool, server_name: str | None) -> bytes:
    """Begin the reply to a request. Returns the head of the answer.

    `may_keep` says whether this server can take another request on the connection.
    """
    text, length, said, is_chunked = call.head, call.length, call.said, False
    is_head = head.method == "HEAD"
    keep_alive = may_keep and head.keep_alive and "close" not in said
    if length is None and call.has_body:
        if call.is_whole and call.is_done:
            length = call.unsent_bytes if is_head else call.produced
        if length is not None:
            text += f"Content-Length: {length}\r\n"
        elif head.version == (1, 1):
            is_chunked = True
            text += "Transfer-Encoding: chunked\r\n"
        else:
            keep_alive = keep_alive and is_head
    if "date" not in said:
        text += f"Date: {date()}\r\n"
    if server_name is not None and "server" not in said:
        text += f"Server: {server_name}\r\n"
    if not keep_alive:
        text += "Connection: close\r\n"
    elif head.version == (1, 0):
        text += "Connection: keep-alive\r\n"
    has_body = call.has_body and not is_head
    reply.begin(call.status, has_body, is_chunked and has_body, length if has_body else 0, keep_alive)
    return f"{text}\r\n".encode("latin-1")
