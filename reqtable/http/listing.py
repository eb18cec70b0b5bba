"""The listing of a folder: reading it, which may take long, and its page, made in small parts."""

from __future__ import annotations

import heapq
import html
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from stat import S_ISDIR, S_ISLNK, S_ISREG
from urllib.parse import quote

from reqtable.http.folder import Folder, Refused

ROWS_MAX = 100_000  # names in one listing; the page says if there are more
PART_ROWS = 64  # rows made in one step
_RUN = 2048  # names sorted at once: a sort can't be interrupted

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_STYLE = (
    ":root{color-scheme:light dark}body{font:1rem/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;"
    "padding:0 1rem}h1{font-size:1.3rem;overflow-wrap:anywhere}table{border-collapse:collapse;width:100%}"
    "th{text-align:left}th,td{padding:.1rem .8rem .1rem 0}td:nth-child(2){text-align:right;white-space:nowrap}"
    "td:nth-child(3){white-space:nowrap}th[scope=row]{font-weight:normal;overflow-wrap:anywhere}"
)


# A name in a folder, its size and when it changed, joined by NULs. A string sorts by its name, and costs the garbage
# collector nothing, which would hold up the loop for a hundred thousand tuples.
Row = str


@dataclass(slots=True)
class Names:
    """Holds what is in a folder, in runs that are sorted."""

    folders: list[list[Row]] = field(default_factory=list)
    files: list[list[Row]] = field(default_factory=list)
    count: int = 0
    is_cut: bool = False  # there are more than ROWS_MAX

    def rows(self) -> Iterator[tuple[bool, Row]]:
        """Yield all rows in order, the folders first, each with whether it is one."""
        return chain(
            ((True, row) for row in heapq.merge(*self.folders)), ((False, row) for row in heapq.merge(*self.files))
        )


def read_folder(folder: Folder, names: Sequence[bytes], dot_files: bool) -> Names:
    """Read the folder that `names` lead to. Leaves out what would not be served. Raises Refused and OSError."""
    found = Names()
    folders: list[Row] = []
    files: list[Row] = []
    with folder.find(names) as spot:
        fd = spot.open_folder()
        try:
            with os.scandir(fd) as entries:
                for entry in entries:
                    status = None if "\\" in entry.name else _status(folder, names, entry, dot_files)
                    if status is None:
                        continue
                    if found.count == ROWS_MAX:
                        found.is_cut = True
                        break
                    found.count += 1
                    run = folders if S_ISDIR(status.st_mode) else files
                    run.append(f"{entry.name}\0{status.st_size}\0{status.st_mtime_ns // 1_000_000_000}")
                    if len(run) == _RUN:
                        (found.folders if run is folders else found.files).append(sorted(run))
                        run.clear()
        finally:
            os.close(fd)
    found.folders.append(sorted(folders))
    found.files.append(sorted(files))
    return found


def _status(folder: Folder, names: Sequence[bytes], entry: os.DirEntry[str], dot_files: bool) -> os.stat_result | None:
    """Return the status of what `entry` leads to; None if it is not served."""
    if entry.name[0] == "." and not dot_files:
        return None
    try:
        status = entry.stat(follow_symlinks=folder.follows)
        if S_ISLNK(status.st_mode):
            with folder.find([*names, os.fsencode(entry.name)]) as spot:
                status = spot.status
    except (OSError, Refused):  # it is gone, or leads nowhere, or out
        return None
    return status if S_ISREG(status.st_mode) or S_ISDIR(status.st_mode) else None


def page_of(path: Sequence[bytes], names: Names) -> Iterator[bytes]:
    """Yield the page that lists `names`, in parts of at most PART_ROWS rows."""
    title = html.escape("/" + "".join(shown(name) + "/" for name in path))
    up = '<p><a href="../">Up to the folder above</a></p>\n' if path else ""
    yield (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Files in {title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>Files in <bdi>{title}</bdi></h1>\n{up}<table>\n<thead><tr>"
        '<th scope="col">Name</th><th scope="col">Size</th><th scope="col">Changed (UTC)</th></tr></thead>\n<tbody>\n'
    ).encode()
    rows = names.rows()
    while part := list(islice(rows, PART_ROWS)):
        yield "".join([_row(is_folder, row) for is_folder, row in part]).encode()
    more = f"<p>There are more than {ROWS_MAX:,} names; these are some of them.</p>\n" if names.is_cut else ""
    yield f"</tbody>\n</table>\n{more}</main>\n</body>\n</html>\n".encode()


def _row(is_folder: bool, row: Row) -> str:
    text, size, modified = row.split("\0")
    name = os.fsencode(text)
    slash = "/" if is_folder else ""
    said = "" if is_folder else size_text(int(size))
    at = _time(int(modified))
    return (
        f'<tr><th scope="row"><a href="{quote(name, safe="")}{slash}"><bdi>{html.escape(shown(name))}</bdi>{slash}</a>'
        f'</th><td>{said}</td><td><time datetime="{at}Z">{at[:10]} {at[11:16]}</time></td></tr>\n'
    )


def _time(seconds: int) -> str:
    try:
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):  # a file system may hold any number
        return "1970-01-01T00:00:00"


def shown(name: bytes) -> str:
    """Return a name as text for people. A control character or a wrong byte is shown as U+FFFD."""
    return _CONTROL.sub("\ufffd", name.decode("utf-8", "replace"))


def size_text(size: int) -> str:
    """Return a size for people: "10.5 KiB"."""
    if size < 1024:
        return f"{size} B"
    units = ["KiB", "MiB", "GiB", "TiB", "PiB"]
    amount = size / 1024
    while amount >= 1023.95 and len(units) > 1:
        amount /= 1024
        del units[0]
    return f"{amount:.1f} {units[0]}"
