"""Whether the files of certificates have changed since they were read."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from reqtable.config import Config

Stamp = tuple[int, int, int, int]  # device, inode, size, and when the file was changed


def stamps_of(servers: Iterable[Any], config: Config) -> dict[str, Stamp]:
    """Return what tells one version of each certificate's file from the next, for servers that `config` is for.

    Raises ConfigurationError if a server can't be served by `config`.
    """
    found = {}
    for server in servers:
        tls = server._endpoint.bind.configured(config).tls
        paths = [tls.client_ca]
        for each in (tls, *tls.names.values()):
            paths += [each.cert, each.key]
        for path in filter(None, paths):
            with suppress(OSError):  # a missing file is refused when it is read
                status = os.stat(path)
                found[path] = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    return found
