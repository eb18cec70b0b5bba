"""`FileRequestHandler`: serves the files of a folder. Derive a class and give it a `root`.

A file is looked up and opened on the loop: a few system calls, which wait for nobody while the folder is on a local
disk. For a slow one, such as a network file system, serve under the policy `pool` or `thread`. A folder is read in a
thread, because it may have any number of names.

A client gets the last bytes of a file only if the file is still what the head of the answer said.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar, NamedTuple
from urllib.parse import quote

from reqtable.handlers.declaration import state
from reqtable.handlers.finding import Finding
from reqtable.handlers.transition import Transition
from reqtable.http.conditions import Range, Validators, http_date, precondition, ranges_of
from reqtable.http.folder import Folder, Refused, Spot, names_of, status_of
from reqtable.http.handler import HTTPRequestHandler
from reqtable.http.listing import Names, page_of, read_folder
from reqtable.http.listing_budget import BUDGET
from reqtable.http.media_types import CODINGS, codings_of, may_have_siblings, type_of
from reqtable.table.errors import SendFileError
from reqtable.table.places import place_of
from reqtable.table.wants import call, flushed

# Up to this many bytes, an answer is read from the file and sent with its head. It is also how much of a larger answer
# is sent last, once the file is known not to have changed.
SMALL_BYTES = 16_384
READS_MAX = 3  # of a small file that changes while it is read

_ASKED = frozenset(
    ("range", "if-range", "if-match", "if-none-match", "if-modified-since", "if-unmodified-since", "accept-encoding")
)
_LISTING_FIELDS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}

Part = bytes | Range  # of a body: what is sent as it is, or what is sent from the file


class Version(NamedTuple):
    """Tells one version of a file from another."""

    mtime_ns: int
    size: int


@dataclass(slots=True)
class _Chosen:
    """Describes the open file that a request is answered with."""

    fd: int
    status: os.stat_result
    media_type: str
    coding: str | None
    varies: bool  # another request for the same path may be answered with another file
    asked: Mapping[str, str]  # the fields of the request that matter


class FileRequestHandler(HTTPRequestHandler):
    """Serves the files below `root` to GET and HEAD (RFC 9110)."""

    root: ClassVar[str] = ""  # the path of the folder
    index_files: ClassVar[tuple[str, ...]] = ("index.html", "index.htm")  # sent in place of their folder
    lists_folders: ClassVar[bool] = True  # true: a folder without an index file shows its names
    shows_dot_files: ClassVar[bool] = False  # true: names that begin with a dot are served
    follows_symlinks: ClassVar[bool] = False  # true: symbolic links may lead out of the folder
    cache_seconds: ClassVar[int | None] = None  # the max-age of Cache-Control; None: no such field

    _kept = ("_file", "_version", "_last")
    _not_fields = HTTPRequestHandler._not_fields | {"_listed"}
    _no_data: ClassVar[Mapping[str, str]] = {"_page": "a listing is half sent"}

    _folder: ClassVar[Folder] = Folder("")
    _file: BinaryIO | None = None  # that is being sent
    _version: Version  # of that file when the answer began
    _last: tuple[Range, bytes]  # what is sent of that file at last, and what then follows
    _page: Iterator[bytes] | None = None  # the listing that is being sent
    _listed: int = 0  # how many rows that listing has

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._folder = Folder(os.path.abspath(cls.root), cls.follows_symlinks)

    @classmethod
    def _unfit(cls) -> Finding | None:
        if not cls.root:
            text, mend = f"{cls.__name__} has no folder to serve", "derive a class with root = '/path/to/folder'"
        elif not os.path.isdir(cls.root):
            text = f"{cls.__name__}.root = {cls.root!r} is not a folder that this user can enter"
            mend = "name another folder"
        else:
            return super()._unfit()
        return Finding("no-folder", place_of(cls), text, mend)

    # -- methods of HTTP ----------------------------------------------------------------------------------------------

    def on_head(self) -> Transition:
        """Refuse a method that the class does not have before its body comes, so that nobody uploads for nothing."""
        method = self.request.method
        return None if method == "HEAD" or hasattr(self, f"do_{method}") else self.respond()

    def do_OPTIONS(self) -> Transition:
        return self.answer(204, fields={"Allow": "GET, HEAD, OPTIONS"})

    def do_GET(self) -> Transition:
        """Answer GET and HEAD with a file, with the listing of a folder, or with the reason why not."""
        try:
            names, is_folder = names_of(self.request.path, self.shows_dot_files)
            return self._serve_folder(names) if is_folder else self._serve_file(names)
        except Refused as refused:
            return self.answer(refused.status, f"{refused}\n")
        except OSError as error:
            return self._serve_error(error)

    def on_error(self, error: Exception) -> Transition:
        if self.reply.status == 0:
            if isinstance(error, Refused):
                return self.answer(error.status)
            if isinstance(error, OSError):  # of the thread that reads a folder
                return self._serve_error(error)
        return super().on_error(error)

    def _serve_error(self, error: OSError) -> Transition:
        status = status_of(error)
        return self.answer(status, fields={"Retry-After": "1"} if status == 503 else ())

    # -- files --------------------------------------------------------------------------------------------------------

    def _serve_file(self, names: tuple[bytes, ...]) -> Transition:
        with self._folder.find(names) as spot:
            if spot.is_folder:
                place = "/" + "".join(quote(name, safe="") + "/" for name in names)
                query = self.request.query
                return self.answer(301, fields={"Location": f"{place}?{query}" if query else place})
            return self._serve(spot, names[-1])

    def _serve(self, spot: Spot, name: bytes) -> Transition:
        """Answer with the file at `spot`. The media type depends on `name`, which may be the name of a link."""
        stem, dot, suffix = name.rpartition(b".")
        media_type = type_of(dot + suffix if stem else b"")
        asked = self._asked()
        coding, fd, status = None, -1, None
        varies = may_have_siblings(media_type)
        if varies and "accept-encoding" in asked:
            coding, fd, status = self._open_sibling(spot, asked["accept-encoding"])
        if status is None:
            fd, status = spot.open_file()
        chosen = _Chosen(fd, status, media_type, coding, varies, asked)
        try:
            return self._answer_file(chosen)
        finally:
            if self._file is None:
                os.close(fd)

    def _asked(self) -> Mapping[str, str]:
        """Return the fields of the request that choose what of a file is sent."""
        found: dict[str, str] = {}
        for name, value in self.request.head.fields:
            if name in _ASKED:
                found[name] = f"{found[name]}, {value}" if name in found else value
        return found

    @staticmethod
    def _open_sibling(spot: Spot, accepted: str) -> tuple[str | None, int, os.stat_result | None]:
        """Open the compressed file beside the one at `spot` that the client prefers, unless it is older."""
        for coding in codings_of(accepted):
            suffix = CODINGS[coding]
            try:
                status = spot.look(suffix)
                if status.st_mtime_ns >= spot.status.st_mtime_ns:
                    return coding, *spot.open_file(suffix, status)
            except (OSError, Refused):  # there is none, or it is not to be served
                continue
        return None, -1, None

    def _answer_file(self, chosen: _Chosen) -> Transition:
        """Answer with the open file. If it is large, `_file` is left with its descriptor."""
        for _ in range(READS_MAX):
            status = chosen.status
            version = _version_of(status, chosen.coding)
            fields = self._fields_of(chosen, version)
            refused = precondition(chosen.asked, version) if chosen.asked else None
            if refused is not None:
                return self.answer(refused, fields=fields if refused == 304 else ())
            code, parts, more = self._parts(chosen, version)
            if code == 416:
                return self.answer(416, fields=more)
            fields += more
            length = sum([len(part) if isinstance(part, bytes) else part.length for part in parts])
            if self.request.method == "HEAD":
                self.begin_answer(code, fields, length)
                return self.end_answer()
            if length > SMALL_BYTES:
                self.begin_answer(code, fields, length)
                return self._begin_file(chosen, parts)
            body = _read(chosen.fd, parts)
            chosen.status = os.fstat(chosen.fd)
            if len(body) == length and _version(status) == _version(chosen.status):
                return self._answer_with(code, fields, body)
        return self.answer(503, fields={"Retry-After": "1"})

    def _fields_of(self, chosen: _Chosen, version: Validators) -> list[tuple[str, str]]:
        """Return the fields that an answer with the file has, and also the answer that the client has it already."""
        fields = [("ETag", version.tag), ("Last-Modified", http_date(version.modified))]
        if chosen.varies:
            fields.append(("Vary", "Accept-Encoding"))
        if self.cache_seconds is not None:
            fields.append(("Cache-Control", f"max-age={self.cache_seconds}" if self.cache_seconds else "no-cache"))
        return fields

    def _parts(self, chosen: _Chosen, version: Validators) -> tuple[int, list[Part], list[tuple[str, str]]]:
        """Return the status of an answer, its body, and the fields that describe the body."""
        size, media_type = chosen.status.st_size, chosen.media_type
        is_ranged = "range" in chosen.asked and self.request.method == "GET"
        ranges = ranges_of(chosen.asked, version, size) if is_ranged else None
        if ranges == []:
            return 416, [], [("Content-Range", f"bytes */{size}")]
        fields = [("Accept-Ranges", "bytes")]
        if chosen.coding is not None:
            fields.append(("Content-Encoding", chosen.coding))
        if ranges is None:
            return 200, [Range(0, size)], [*fields, ("Content-Type", media_type)]
        if len(ranges) == 1:
            fields += [("Content-Type", media_type), ("Content-Range", ranges[0].content_range(size))]
            return 206, [*ranges], fields
        boundary = secrets.token_hex(16)
        fields.append(("Content-Type", f"multipart/byteranges; boundary={boundary}"))
        parts: list[Part] = []
        for each in ranges:
            head = f"--{boundary}\r\nContent-Type: {media_type}\r\nContent-Range: {each.content_range(size)}\r\n\r\n"
            parts += [(b"\r\n" if parts else b"") + head.encode("latin-1"), each]
        return 206, [*parts, f"\r\n--{boundary}--\r\n".encode("latin-1")], fields

    def _begin_file(self, chosen: _Chosen, parts: list[Part]) -> Transition:
        """Have the kernel send all but the last bytes from the file."""
        # An error names the file as the client has named it. `_release` closes it.
        self._file = open(self.request.path, "rb", buffering=0, opener=lambda *_: chosen.fd)  # noqa: SIM115
        self._version = _version(chosen.status)
        end = parts.pop() if isinstance(parts[-1], bytes) else b""
        last = parts.pop()
        assert isinstance(end, bytes)
        assert isinstance(last, Range)
        for part in parts:
            self._write_part(part)
        at_last = min(last.length, SMALL_BYTES)
        if at_last < last.length:
            self._write_part(Range(last.start, last.length - at_last))
        self._last = Range(last.start + last.length - at_last, at_last), end
        return self.sending, flushed()

    def _write_part(self, part: Part) -> None:
        if isinstance(part, bytes):
            self.write(part)
            return
        assert self._file is not None
        assert self.reply.left is not None
        self.reply.left -= part.length
        self.reply.sent += part.length
        self.send_file(self._file, part.start, part.length)

    @state(flushed())
    def sending(self, _: None) -> Transition:
        """All but the last bytes of a file are sent."""
        assert self._file is not None
        last, end = self._last
        data = os.pread(self._file.fileno(), last.length, last.start)
        was, now = self._version, _version(os.fstat(self._file.fileno()))
        # What has grown was appended to: the bytes that were promised are the same.
        if len(data) < last.length or not (was == now or now.size > was.size):
            raise SendFileError(f"the file {self.request.path!r} that is being sent has changed")
        self._release()
        self.write(data + end)
        return self.end_answer()

    def _close(self) -> None:
        self._release()
        super()._close()

    def _release(self) -> None:
        """Close what the answer needed."""
        file, self._file = self._file, None
        if file is not None:
            file.close()
        self._page = None
        listed, self._listed = self._listed, 0
        if listed:
            BUDGET.release(listed)

    # -- folders ------------------------------------------------------------------------------------------------------

    def _serve_folder(self, names: tuple[bytes, ...]) -> Transition:
        for index in self.index_files:
            name = os.fsencode(index)
            try:
                with self._folder.find([*names, name]) as spot:
                    if not spot.is_folder:
                        return self._serve(spot, name)
            except FileNotFoundError:
                continue
        with self._folder.find(names) as spot:
            if not spot.is_folder:
                raise Refused(404, "no such folder")
            if not self.lists_folders:
                raise Refused(403, "the names in a folder are not shown")
            os.close(spot.open_folder())  # if it can't be read, HEAD says so, too
        if self.request.method == "HEAD":
            self._begin_page()
            return self._end_page()
        return self.listing, call(read_folder, self._folder, names, self.shows_dot_files, on="thread")

    def _begin_page(self) -> None:
        self.begin_answer(200, {"Content-Type": "text/html; charset=utf-8", **_LISTING_FIELDS})

    def _end_page(self) -> Transition:
        self._release()
        return self.end_answer()

    @state()
    def listing(self, names: Names) -> Transition:
        """The names in a folder were read."""
        if not BUDGET.take(names.count):
            return self.answer(503, fields={"Retry-After": "1"})
        self._listed = names.count
        path, _ = names_of(self.request.path, self.shows_dot_files)
        self._begin_page()
        self._page = page_of(path, names)
        return self.rows(None)

    @state(flushed())
    def rows(self, _: None) -> Transition:
        """Part of a listing was sent."""
        assert self._page is not None
        part = next(self._page, None)
        if part is None:
            return self._end_page()
        self.write(part)
        return self.rows


def _version_of(status: os.stat_result, coding: str | None) -> Validators:
    now = int(time.time())
    tag = f'"{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}{"-" + coding if coding else ""}"'
    # An answer can't be older than what it answers with (RFC 9110, 8.8.2.1).
    return Validators(tag, max(0, min(status.st_mtime_ns // 1_000_000_000, now)), now)


def _version(status: os.stat_result) -> Version:
    return Version(status.st_mtime_ns, status.st_size)


def _read(fd: int, parts: list[Part]) -> bytes:
    return b"".join([part if isinstance(part, bytes) else os.pread(fd, part.length, part.start) for part in parts])
