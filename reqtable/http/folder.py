"""A folder to serve: it finds and opens what a path names, and nothing outside the folder.

A path is opened name by name, each relative to the descriptor of the folder before it, and never through a symbolic
link (openat(2), O_NOFOLLOW). A link is read instead, and the search begins again with what the link names. So there is
no moment between a check and an open in which somebody could swap a folder for a link.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from stat import S_ISDIR, S_ISLNK, S_ISREG
from typing import Any, ClassVar
from urllib.parse import unquote_to_bytes

from reqtable.table.errors import PeerError

RESTARTS_MAX = 64  # links, and ".." in links, on the way to one file

# O_PATH: a folder on the way needs only the right to search it, not to read it.
_ENTER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY  # a FIFO or a terminal must hold up nobody
_NO_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_NO_NAME = re.compile(r"%(?:00|2[Ff]|5[Cc])|\\")
_NOT_FOUND = {
    getattr(errno, name)
    for name in ("ENOENT", "ENOTDIR", "ENAMETOOLONG", "EINVAL", "EILSEQ", "EISDIR")
    if hasattr(errno, name)
}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENXIO, errno.ENODEV}
_NOT_NOW = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class Refused(PeerError):
    """A path that is not served. `status` is that of the answer."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"{status}: {reason}")
        self.status = status
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.status, self.reason)


def status_of(error: OSError) -> int:
    """Return the status of the answer if the file system fails with `error`."""
    if error.errno in _NOT_FOUND:
        return 404
    if error.errno in _FORBIDDEN:
        return 403
    return 503 if error.errno in _NOT_NOW else 500


@lru_cache(maxsize=512)
def names_of(path: str, dot_files: bool) -> tuple[tuple[bytes, ...], bool]:
    """Return the names in the path of a request, and whether it ends with a slash. Raises Refused.

    ".." and "." are names that nothing has. To resolve them here would let a client go around a rule for paths that a
    proxy in front has checked.
    """
    if _NO_ESCAPE.search(path):
        raise Refused(400, "a percent sign without two hexadecimal digits")
    if _NO_NAME.search(path):
        raise Refused(400, "a NUL or a slash inside a name")
    names = tuple(name for name in unquote_to_bytes(path).split(b"/") if name)
    for name in names:
        if name in (b".", b"..") or (name[0] == 46 and not dot_files):
            raise Refused(404, "no such file")
    return names, path.endswith("/")


class Spot:
    """Describes a file or a folder that was found: `leaf` in the folder with the descriptor `fd`. Close it.

    `status` is that of the leaf, which is no symbolic link, unless the folder's owner allows all links.
    """

    __slots__ = ("fd", "leaf", "prefix", "status")

    follows: ClassVar[bool] = False

    def __init__(self, fd: int | None, prefix: bytes, leaf: bytes) -> None:
        self.fd = fd
        self.prefix = prefix  # the path of the root, if `fd` is None
        self.leaf = leaf
        self.status: os.stat_result

    def __enter__(self) -> Spot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    @property
    def is_folder(self) -> bool:
        return S_ISDIR(self.status.st_mode)

    def look(self, suffix: bytes = b"") -> os.stat_result:
        """Return the status of what lies beside the leaf, with `suffix` after its name."""
        return os.stat(self.prefix + self.leaf + suffix, dir_fd=self.fd, follow_symlinks=self.follows)

    def open_file(self, suffix: bytes = b"", status: os.stat_result | None = None) -> tuple[int, os.stat_result]:
        """Open the leaf, or what lies beside it. Returns its descriptor and its status. Raises Refused and OSError.

        Only a regular file is opened: to open a FIFO or a device already has effects.
        """
        self._check_regular(status or self.status)
        fd = os.open(self.prefix + self.leaf + suffix, self._flags(_READ), dir_fd=self.fd)
        try:
            found = os.fstat(fd)
            self._check_regular(found)
        except BaseException:
            os.close(fd)
            raise
        return fd, found

    def open_folder(self) -> int:
        """Open the leaf, a folder, for reading its names."""
        return os.open(self.prefix + self.leaf, self._flags(_READ | os.O_DIRECTORY), dir_fd=self.fd)

    def _flags(self, flags: int) -> int:
        return flags & ~os.O_NOFOLLOW if self.follows else flags

    @staticmethod
    def _check_regular(status: os.stat_result) -> None:
        if not S_ISREG(status.st_mode):
            raise Refused(403, "not a regular file")


class _FollowingSpot(Spot):
    """Describes what was found by following all links."""

    __slots__ = ()

    follows: ClassVar[bool] = True


class Folder:
    """Finds files below `root`. If `follows`, it follows all links; else only those that stay below `root`."""

    def __init__(self, root: str, follows: bool = False) -> None:
        self.root = os.fsencode(root)
        self.follows = follows
        self._prefix = os.path.join(self.root, b"")

    def find(self, names: Sequence[bytes]) -> Spot:
        """Find what `names` lead to from the root. Raises Refused and OSError."""
        if self.follows:
            spot: Spot = _FollowingSpot(None, self._prefix, b"/".join(names) or b".")
            spot.status = spot.look()
            return spot
        todo = list(reversed(names))
        for _ in range(RESTARTS_MAX):
            found = self._descend(todo)
            if isinstance(found, Spot):
                return found
            todo = found
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))

    def _descend(self, todo: list[bytes]) -> Spot | list[bytes]:
        """Go down from the root. Returns the spot, or, at a link, the names to begin again with, the first one last."""
        spot = Spot(None, self._prefix, b".")
        passed: list[bytes] = []  # the folders on the way; none is a link
        try:
            while todo:
                name = todo.pop()
                if name in (b"", b"."):  # in a link
                    continue
                if name == b"..":
                    if not passed:
                        raise _leads_out()
                    todo += reversed(passed[:-1])
                    spot.close()
                    return todo
                spot.leaf = name
                if todo:
                    target = self._enter(spot)
                else:
                    spot.status = spot.look()
                    if not S_ISLNK(spot.status.st_mode):
                        return spot
                    target = os.readlink(spot.prefix + name, dir_fd=spot.fd)
                if target is not None:
                    todo += self._from(target, passed)
                    spot.close()
                    return todo
                passed.append(name)
            spot.leaf = b"."
            spot.status = spot.look()
            return spot
        except BaseException:
            spot.close()
            raise

    @staticmethod
    def _enter(spot: Spot) -> bytes | None:
        """Move the spot into the folder that its leaf is. Returns None, or the target of the link that the leaf is."""
        path = spot.prefix + spot.leaf
        try:
            fd = os.open(path, _ENTER, dir_fd=spot.fd)
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            try:
                return os.readlink(path, dir_fd=spot.fd)
            except OSError:
                raise error from None  # it is no link
        spot.close()
        spot.fd, spot.prefix = fd, b""
        return None

    def _from(self, target: bytes, passed: Sequence[bytes]) -> list[bytes]:
        """Return the names, the first one last, that a link in the folder `passed` leads to. Raises Refused."""
        if not target.startswith(b"/"):
            return [*reversed(target.split(b"/")), *reversed(passed)]
        for root in (self.root, os.path.realpath(self.root)):
            below = os.path.join(root, b"")
            if target == root or target.startswith(below):
                return list(reversed(target[len(root) :].split(b"/")))
        raise _leads_out()


def _leads_out() -> Refused:
    return Refused(403, "a symbolic link that leads out of the folder")
