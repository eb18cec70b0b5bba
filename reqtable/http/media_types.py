"""The media types of files, by their names: they are the same on every machine; and content codings."""

from __future__ import annotations

import mimetypes
from functools import lru_cache

UNKNOWN = "application/octet-stream"
# Content coding -> what the name of a file in that coding ends with. The first is preferred.
CODINGS = {"br": b".br", "zstd": b".zst", "gzip": b".gz"}
# Types that Python's own table lacks or has otherwise, in one version or another.
_OWN = {
    ".7z": "application/x-7z-compressed",
    ".apng": "image/apng",
    ".avif": "image/avif",
    ".br": "application/octet-stream",
    ".bz2": "application/x-bzip2",
    ".cjs": "text/javascript",
    ".css": "text/css",
    ".csv": "text/csv",
    ".epub": "application/epub+zip",
    ".flac": "audio/flac",
    ".gz": "application/gzip",
    ".heic": "image/heic",
    ".ico": "image/vnd.microsoft.icon",
    ".jpg": "image/jpeg",
    ".js": "text/javascript",
    ".json": "application/json",
    ".jsonld": "application/ld+json",
    ".log": "text/plain",
    ".m4a": "audio/mp4",
    ".map": "application/json",
    ".md": "text/markdown",
    ".mjs": "text/javascript",
    ".mkv": "video/x-matroska",
    ".mp3": "audio/mpeg",
    ".mp4": "video/mp4",
    ".oga": "audio/ogg",
    ".ogg": "audio/ogg",
    ".ogv": "video/ogg",
    ".opus": "audio/ogg",
    ".otf": "font/otf",
    ".rst": "text/x-rst",
    ".svg": "image/svg+xml",
    ".svgz": "application/gzip",
    ".toml": "application/toml",
    ".ttf": "font/ttf",
    ".wasm": "application/wasm",
    ".wav": "audio/wav",
    ".weba": "audio/webm",
    ".webm": "video/webm",
    ".webmanifest": "application/manifest+json",
    ".webp": "image/webp",
    ".woff": "font/woff",
    ".woff2": "font/woff2",
    ".xhtml": "application/xhtml+xml",
    ".xml": "text/xml",
    ".xz": "application/x-xz",
    ".yaml": "application/yaml",
    ".yml": "application/yaml",
    ".zip": "application/zip",
    ".zst": "application/zstd",
}
# `MimeTypes()` has what is written in the standard library, and reads no file of the machine.
_TYPES = {**mimetypes.MimeTypes().types_map[True], **_OWN}
_COMPRESSED = {"application/gzip", "application/zip", "application/zstd", "application/x-xz", "font/woff", "font/woff2"}


@lru_cache(maxsize=1024)
def type_of(suffix: bytes) -> str:
    """Return the media type for what a file's name ends with, such as b".html"."""
    found = _TYPES.get(suffix.decode("latin-1").lower(), UNKNOWN)
    return f"{found}; charset=utf-8" if found.startswith("text/") else found


@lru_cache(maxsize=1024)
def may_have_siblings(media_type: str) -> bool:
    """Return whether a file of that type is worth compressing, so that its compressed siblings are looked for."""
    kind = media_type.partition("/")[0]
    return media_type == "image/svg+xml" or (kind not in ("image", "audio", "video") and media_type not in _COMPRESSED)


@lru_cache(maxsize=256)
def codings_of(accepted: str) -> tuple[str, ...]:
    """Return the codings that an `Accept-Encoding` prefers to the plain file, the best first (RFC 9110, 12.5.3)."""
    weights: dict[str, float] = {}
    for each in accepted.lower().split(","):
        coding, *parameters = (part.strip(" \t") for part in each.split(";"))
        weight = 1.0
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name.strip(" \t") == "q":
                weight = _weight(value.strip(" \t"))
        weights[{"x-gzip": "gzip"}.get(coding, coding)] = weight
    others = weights.get("*", 0.0)
    plain = weights.get("identity", 0.0)
    found = [(weights.get(coding, others), coding) for coding in CODINGS]
    return tuple(
        coding for weight, coding in sorted(found, key=lambda pair: -pair[0]) if weight > 0 and weight >= plain
    )


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        return 0.0
    return weight if 0 <= weight <= 1 else 0.0
