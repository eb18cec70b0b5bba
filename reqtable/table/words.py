"""Words of messages."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """Return `1 request`, `2 requests`, and so on."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
