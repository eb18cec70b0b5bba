"""The opening handshake of a WebSocket (RFC 6455, section 4): what a request asks for, and what it gets."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from reqtable.http.head import BadRequest, Head

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_VERSION = "13"


class Asked(NamedTuple):
    """The wishes of a client. `key` is the field that proves that the answer is a WebSocket's."""

    key: str
    subprotocol: str | None  # the first one of the handler's that the client knows; None: neither names one
    extensions: str | None
    origin: str | None


def asks_for_websocket(head: Head) -> bool:
    """Return whether a request asks for a WebSocket."""
    return head.method == "GET" and "websocket" in [each.strip() for each in (head.upgrade or "").split(",")]


def parse_handshake(head: Head, subprotocols: Sequence[str] = ()) -> Asked:
    """Return what a request that `asks_for_websocket` asks for. Raises BadRequest."""
    if head.has_body:
        raise BadRequest(400, "a body in the handshake of a WebSocket")
    if head.get("sec-websocket-version") != _VERSION:
        raise BadRequest(426, "only version 13 of WebSockets is spoken here")
    key = head.get("sec-websocket-key", "") or ""
    try:
        nonce = base64.b64decode(key, validate=True)
    except (binascii.Error, ValueError):
        nonce = b""
    if len(nonce) != 16:
        raise BadRequest(400, "the Sec-WebSocket-Key is not 16 bytes in base64")
    offered = [each.strip() for each in (head.get("sec-websocket-protocol") or "").split(",")]
    chosen = next((each for each in subprotocols if each in offered), None)
    return Asked(key, chosen, head.get("sec-websocket-extensions"), head.get("origin"))


def accept_of(key: str) -> str:
    """Return the value of Sec-WebSocket-Accept."""
    return base64.b64encode(hashlib.sha1(key.encode("ascii") + _GUID, usedforsecurity=False).digest()).decode("ascii")


def answer_fields(asked: Asked, extensions: str | None) -> list[tuple[str, str]]:
    """Return the fields of the answer with the status 101."""
    fields = [("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Accept", accept_of(asked.key))]
    if asked.subprotocol is not None:
        fields.append(("Sec-WebSocket-Protocol", asked.subprotocol))
    if extensions is not None:
        fields.append(("Sec-WebSocket-Extensions", extensions))
    return fields


def refusal_fields(status: int) -> list[tuple[str, str]]:
    """Return the fields that an answer to a bad handshake needs."""
    if status != 426:
        return []
    return [("Upgrade", "websocket"), ("Connection", "Upgrade, close"), ("Sec-WebSocket-Version", _VERSION)]


def is_same_origin(origin: str | None, host: str | None) -> bool:
    """Return whether a page of `host` itself opens the WebSocket. Programs that are no browsers name no origin."""
    return origin is None or (host is not None and origin.partition("://")[2].lower() == host.lower())
