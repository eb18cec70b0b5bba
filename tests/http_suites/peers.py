"""The application that peers serve: it answers with how it has split the bytes into requests."""

from __future__ import annotations

from typing import Any


def wsgi(environ: Any, start_response: Any) -> list[bytes]:
    body = environ["wsgi.input"].read() if environ.get("wsgi.input_terminated") else _read(environ)
    text = b"<%s %s %d>" % (environ["REQUEST_METHOD"].encode(), environ["PATH_INFO"].encode("latin-1"), len(body))
    start_response("200 OK", [("Content-Length", str(len(text)))])
    return [text]


def _read(environ: Any) -> bytes:
    data: bytes = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    return data


async def asgi(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        raise RuntimeError("only HTTP")
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    text = b"<%s %s %d>" % (scope["method"].encode(), scope["path"].encode(), len(body))
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(text))]})
    await send({"type": "http.response.body", "body": text})
