"""Folders over HTTP: their listing, in order, with every name, in steps, and for many clients."""

from __future__ import annotations

import os
import re
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from reqtable.http import listing
from reqtable.http.folder import Folder, Refused
from reqtable.http.listing import PART_ROWS, page_of, read_folder, size_text
from reqtable.http.listing_budget import BUDGET
from tests.http_client import Asking, files_of, folder_in, get
from tests.support import open_descriptors, served, slow_but, wait_until


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return folder_in(tmp_path)


class Page(HTMLParser):
    """Reads a listing: the links, and the text of each."""

    def __init__(self, body: bytes) -> None:
        super().__init__()
        self.links: dict[str, str] = {}
        self.elements: list[str] = []
        self._link: str | None = None
        self.feed(body.decode())
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        if tag == "a":
            self._link = dict(attrs)["href"] or ""
            self.links[self._link] = ""

    def handle_endtag(self, tag: str) -> None:
        if tag == "a":
            self._link = None

    def handle_data(self, data: str) -> None:
        if self._link is not None:
            self.links[self._link] += data


NAMES = [
    b"<script>alert(1)", b'a"b', b"a'b&c", b"javascript:alert(1)", b"a b%20c", b"a?b#c", b"caf\xc3\xa9",
    b"not utf-8 \xff\xfe", b"line\nbreak", b"\xe2\x80\xaertl", b"-", b"~", b"a;b", b"x" * 255,
]  # fmt: skip


@pytest.mark.parametrize("dispatch", ["inline", "thread"])
def test_every_name_is_listed_and_served(root: Path, dispatch: str) -> None:
    for name in NAMES:
        path = os.path.join(os.fsencode(root / "sub" / "deep"), name)
        Path(os.fsdecode(path)).write_bytes(name)
    with served(files_of(root), dispatch) as server, Asking(server.server_address) as client:
        found = client.get("/sub/deep/")
        page = Page(found.body)
        assert found.fields["content-type"] == "text/html; charset=utf-8"
        assert "script" not in page.elements
        links = list(page.links)
        assert links[0] == "../"
        assert {urllib.parse.unquote_to_bytes(link) for link in links[1:]} == {*NAMES, b"a.txt"}
        for link in links[1:]:
            path = urllib.parse.urljoin("/sub/deep/", link)
            assert path.startswith("/sub/deep/")
            if link != "a.txt":
                assert client.get(path).body == urllib.parse.unquote_to_bytes(link)
        assert page.links["not%20utf-8%20%FF%FE"] == "not utf-8 \ufffd\ufffd"
        assert page.links["line%0Abreak"] == "line\ufffdbreak"


def test_order_and_what_is_left_out(root: Path, tmp_path: Path) -> None:
    (root / "zzz").mkdir()
    (root / "Aaa").mkdir()
    (root / ".hidden").write_text("")
    (root / "back\\slash").write_text("")
    os.mkfifo(root / "fifo")
    (root / "link_out").symlink_to(tmp_path)
    (root / "link_in").symlink_to("sub")
    (root / "link_nowhere").symlink_to("nothing")
    with served(files_of(root)) as server:
        page = Page(get(server, "/").body)
        assert list(page.links) == ["Aaa/", "link_in/", "sub/", "zzz/", "big.bin", "empty", "page.html"]
        assert page.links["sub/"] == "sub/"
        assert {"main", "h1", "thead", "th", "time"} <= set(page.elements)
        assert b"1.0 MiB" in get(server, "/").body
        assert b"2020-09-13 12:26" in get(server, "/").body
    with served(files_of(root, shows_dot_files=True, follows_symlinks=True)) as server:
        links = Page(get(server, "/").body).links
        assert ".hidden" in links
        assert "link_out/" in links


def test_http_1_0(root: Path) -> None:
    with served(files_of(root)) as server, Asking(server.server_address) as client:
        head, _, body = client.send(b"GET / HTTP/1.0\r\n\r\n").rest().partition(b"\r\n\r\n")
        assert b"Transfer-Encoding" not in head
        assert body.endswith(b"</html>\n")


def test_a_folder_that_goes_away_while_it_is_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*args: Any) -> Any:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr("reqtable.http.files.read_folder", gone)
    with served(files_of(root)) as server, Asking(server.server_address) as client:
        assert client.get("/").status == 404
        assert client.get("/page.html").status == 200


def test_a_listing_is_bounded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "ROWS_MAX", 300)
    monkeypatch.setattr(listing, "_RUN", 7)
    for number in range(400):
        (root / "zzz").mkdir(exist_ok=True)
        (root / "zzz" / f"{number:03}").touch()
    names = read_folder(Folder(str(root)), [b"zzz"], False)
    assert (names.count, names.is_cut) == (300, True)
    rows = [row.partition("\0")[0] for _, row in names.rows()]
    assert rows == sorted(rows)
    parts = list(page_of([b"zzz"], names))
    assert max(part.count(b"<tr>") for part in parts) == PART_ROWS
    assert b"more than 300 names" in parts[-1]
    with pytest.raises(Refused):
        read_folder(Folder(str(root)), [b".."], False)


def test_listings_in_memory_are_bounded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BUDGET, "most", BUDGET.held + 4)
    with served(files_of(root)) as server, Asking(server.server_address) as client:
        for _ in range(3):  # a listing that is sent gives its rows back
            assert client.get("/").status == 200
        (root / "one").touch()
        found = client.get("/")
        assert (found.status, found.fields["retry-after"]) == (503, "1")


@pytest.mark.parametrize("count", slow_but([5_000, 100_000], 5_000))
def test_many_names_hold_up_nobody(root: Path, count: int) -> None:
    """Another client is answered while a listing is sent, and a client that leaves leaves nothing behind."""
    many = root / "many"
    many.mkdir()
    for number in range(count):
        (many / f"{number:06} with a name of usual length.txt").touch()
    with served(files_of(root)) as server, Asking(server.server_address) as other:
        other.get("/page.html")
        before = open_descriptors()
        with Asking(server.server_address) as client:
            client.send(b"GET /many/ HTTP/1.1\r\nHost: x\r\n\r\n")
            client.head()
            for _ in range(10):  # while the listing is sent: its client reads nothing
                assert other.get("/page.html").status == 200
            if count == 100_000:  # more than the kernel takes
                wait_until(server, lambda: bool(server.table.snapshot(state="WRITING")))
                [row] = server.table.snapshot(state="WRITING")
                assert row["buffered_out"] < 200_000
            client.reset()
        with Asking(server.server_address) as client:
            links = re.findall(rb'href="([^"]*)"', client.get("/many/").body)
            assert len(links) == count + 1
            assert links == sorted(links)
        wait_until(server, lambda: len(server.table) == 1)
        assert open_descriptors() == before
        assert BUDGET.held == 0


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1048575, "1.0 MiB"),
        (10**9, "953.7 MiB"),
        (2**60, "1024.0 PiB"),
    ],
)
def test_sizes(size: int, text: str) -> None:
    assert size_text(size) == text
