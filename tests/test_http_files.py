"""Files over HTTP: what is served, what is refused, and files that change."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path
from typing import Any

import pytest

import reqtable
from reqtable.http import files as http_files
from reqtable.http.files import FileRequestHandler
from reqtable.http.folder import Folder, Refused
from reqtable.table.errors import ConfigurationError
from reqtable.testing import exercise
from tests.http_client import BIG, LONG_AGO, Asking, files_of, folder_in, get
from tests.support import open_descriptors, served, wait_until

POLICIES = ["inline", "greenlet", "pool", "thread", "fork"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return folder_in(tmp_path)


# -- what is served ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dispatch", POLICIES)
def test_files_on_one_connection_under_every_policy(root: Path, dispatch: str) -> None:
    before = open_descriptors()
    with served(files_of(root), dispatch) as server:
        with Asking(server.server_address) as client:
            small = client.get("/page.html")
            assert (small.status, small.body) == (200, b"<p>hello")
            assert small.fields["content-type"] == "text/html; charset=utf-8"
            assert client.get("/big.bin").body == BIG
            assert client.get("/big.bin", range=f"bytes=5-{len(BIG) - 7}").body == BIG[5:-6]
            assert client.get("/sub/").body == b"the index"
            assert b'href="a.txt"' in client.get("/sub/deep/").body
            assert client.get("/nothing").status == 404
            assert client.get("/empty").body == b""
            client.hang_up()
        wait_until(server, lambda: not len(server.table))
    assert open_descriptors() == before


def test_without_sockets(root: Path) -> None:
    request = b"GET /sub/deep/a.txt HTTP/1.1\r\nHost: x\r\nRange: bytes=2-4\r\n\r\n"
    begun = exercise(files_of(root)).send(request)
    assert b"206 Partial Content" in begun.output
    begun = exercise(files_of(root)).send(b"GET /big.bin HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert begun.output.endswith(BIG[-50:])


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 200),
        ("//sub///deep//a.txt", 200),
        ("/sub", 301),
        ("/page.html/", 404),
        ("/page.html/x", 404),
        ("/nothing/x", 404),
        ("/..", 404),
        ("/../secret", 404),
        ("/%2e%2e/secret", 404),
        ("/sub/../page.html", 404),
        ("/./page.html", 404),
        ("/.../secret", 404),
        ("/..;/secret", 404),
        ("/..%2fsecret", 400),
        ("/..%5Csecret", 400),
        ("/..\\secret", 400),
        ("/page.html%00.txt", 400),
        ("/%zz", 400),
        ("/%", 400),
        ("/PAGE.HTML", 404),
        ("/page.html.", 404),
        ("/" + "x" * 300, 404),
        ("/" + "x/" * 4000, 404),
        ("/" + "x" * 9000, 414),
        ("/.hidden", 404),
        ("/.folder/x", 404),
        ("/fifo", 403),
        ("/socket", 403),
        ("/link_out", 403),
        ("/link_out_by_dots", 403),
        ("/folder_out/secret", 403),
        ("/link_loop", 403),
        ("/link_nowhere", 404),
        ("/link_in", 200),
        ("/folder_in/deep/a.txt", 200),
        ("/link_absolute", 200),
        ("/sub/link_up", 200),
        ("/sub/link_here/deep/a.txt", 200),
    ],
)
def test_what_a_path_leads_to(root: Path, tmp_path: Path, path: str, status: int) -> None:
    (root / ".hidden").write_text("x")
    (root / ".folder").mkdir()
    (root / ".folder" / "x").write_text("x")
    os.mkfifo(root / "fifo")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(os.path.relpath(root / "socket"))
    listening.close()
    for name, target in {
        "link_out": tmp_path / "secret",
        "link_out_by_dots": "sub/../../secret",
        "folder_out": tmp_path,
        "link_loop": "link_loop",
        "link_nowhere": "nothing",
        "link_in": "page.html",
        "folder_in": "sub",
        "link_absolute": root / "sub" / "deep" / "a.txt",
        "sub/link_up": "../sub/./deep/../../page.html",
        "sub/link_here": "./",
    }.items():
        (root / name).symlink_to(target)
    before = open_descriptors()
    with served(files_of(root)) as server:
        found = get(server, path)
        assert found.status == status
        assert b"secret" not in found.body
    assert open_descriptors() == before
    if status in (404, 403, 400):
        with served(files_of(root), "pool") as server:
            assert get(server, path, "HEAD").status == status


@pytest.mark.parametrize("seed", range(20))
def test_links_at_random_never_lead_out(tmp_path: Path, seed: int) -> None:
    """Whatever is found lies below the root, and is what the operating system finds, too."""
    dice = random.Random(seed)
    root = tmp_path / "root"
    folders = [root / "a" / "b", root / "a", root / "c", root, tmp_path / "out"]
    for each in folders:
        each.mkdir(parents=True, exist_ok=True)
        (each / "f").touch()
    words = ["..", ".", "", "a", "b", "c", "f", "x", "y", "out", "root", str(root), str(tmp_path), str(root / "a")]
    for folder in folders:
        for name in ("x", "y"):
            (folder / name).symlink_to("/".join(dice.choices(words, k=dice.randint(1, 5))) or ".")
    before, found = open_descriptors(), 0
    for _ in range(300):
        names = dice.choices(["a", "b", "c", "f", "x", "y"], k=dice.randint(1, 4))
        try:
            with Folder(str(root)).find([os.fsencode(name) for name in names]) as spot:
                status = spot.status
        except (OSError, Refused):
            continue
        found += 1
        real = os.path.realpath(root / "/".join(names))
        assert os.path.commonpath([real, root]) == str(root)
        assert os.path.samestat(status, os.stat(real))
    assert found
    assert open_descriptors() == before


def test_what_the_options_allow(root: Path, tmp_path: Path) -> None:
    (root / ".hidden").write_text("x")
    (root / "link_out").symlink_to(tmp_path / "secret")
    allowed = files_of(root, shows_dot_files=True, follows_symlinks=True, lists_folders=False, cache_seconds=60)
    with served(allowed) as server:
        assert get(server, "/.hidden").body == b"x"
        assert get(server, "/link_out").body == b"secret"
        assert get(server, "/link_out").fields["cache-control"] == "max-age=60"
        assert get(server, "/../secret").status == 404
        assert get(server, "/").status == 403
        assert get(server, "/sub/").body == b"the index"
    with served(files_of(root, cache_seconds=0)) as server:
        assert get(server, "/page.html").fields["cache-control"] == "no-cache"


def test_a_file_that_may_not_be_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refusing(path: Any, *args: Any, **kwargs: Any) -> int:
        if bytes(path if isinstance(path, bytes) else os.fsencode(path)).endswith((b"page.html", b"deep")):
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **kwargs)

    (root / "page.html").chmod(0)
    if os.geteuid() == 0:  # it may read everything
        monkeypatch.setattr(os, "open", refusing)
    with served(files_of(root)) as server:
        assert get(server, "/page.html").status == 403
    monkeypatch.setattr(os, "open", refusing)
    with served(files_of(root)) as server:
        assert get(server, "/sub/deep/").status == get(server, "/sub/deep/", "HEAD").status == 403


@pytest.mark.parametrize("what", ["file", "folder"])
def test_nobody_can_swap_a_name_for_a_link_in_time(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The name becomes a link that leads out just before it is opened, after it was looked at."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "a.txt").write_text("secret")
    opened, name = os.open, b"a.txt" if what == "file" else b"deep"
    swaps = []

    def swapping(path: Any, *args: Any, **kwargs: Any) -> int:
        if isinstance(path, bytes) and path.rpartition(b"/")[2] == name and not swaps:
            swaps.append(path)
            place = root / "sub" / "deep" if what == "folder" else root / "sub" / "deep" / "a.txt"
            place.rename(tmp_path / "away")
            place.symlink_to(tmp_path / "outside" / ("" if what == "folder" else "a.txt"))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", swapping)
    with served(files_of(root)) as server:
        found = get(server, "/sub/deep/a.txt")
    assert swaps
    assert found.status in (403, 404)
    assert b"secret" not in found.body


def test_a_fifo_is_not_opened(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To open it would wake the process that waits for a reader, and then end it with SIGPIPE."""
    os.mkfifo(root / "fifo")
    opened, paths = os.open, []

    def recording(path: Any, *args: Any, **kwargs: Any) -> int:
        paths.append(path)
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", recording)
    with served(files_of(root)) as server:
        assert get(server, "/fifo").status == 403
        assert get(server, "/page.html").status == 200
    assert [os.path.basename(path) for path in paths if isinstance(path, bytes)] == [b"page.html"]


def test_methods(root: Path) -> None:
    with served(files_of(root)) as server, Asking(server.server_address) as client:
        for path in ("/page.html", "/big.bin", "/sub/", "/sub", "/", "/nothing"):
            with_body, without = client.get(path), client.get(path, "HEAD")
            assert (without.status, without.body) == (with_body.status, b"")
            assert {**with_body.fields, "date": ""} == {**without.fields, "date": ""}
        assert client.get("/", "OPTIONS").fields["allow"] == "GET, HEAD, OPTIONS"
        assert client.get("*", "OPTIONS").status == 204
        refused = client.get("/page.html", "DELETE")
        assert (refused.status, refused.fields["allow"]) == (405, "GET, HEAD, OPTIONS")
        assert client.get("/page.html", "POST", Content_Length="1000000").status == 405  # before the body


def test_a_class_may_have_other_methods(root: Path) -> None:
    def do_POST(self: Any) -> Any:
        return self.answer(200, self.request.body)

    with served(files_of(root, do_POST=do_POST)) as server, Asking(server.server_address) as client:
        client.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n")
        wait_until(server, lambda: [each.handler.state_name for each in server.table] == ["body"])
        assert client.send(b"abc").answer().body == b"abc"


def test_a_redirect_stays_on_this_server(root: Path) -> None:
    (root / "a b?é").mkdir()
    with served(files_of(root)) as server:
        assert get(server, "/sub?x=1").fields["location"] == "/sub/?x=1"
        assert get(server, "//sub").fields["location"] == "/sub/"
        assert get(server, "/a%20b%3F%C3%A9").fields["location"] == "/a%20b%3F%C3%A9/"


def test_a_class_without_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="has no folder to serve"):
        reqtable.TCPServer(("127.0.0.1", 0), FileRequestHandler)
    with pytest.raises(ConfigurationError, match="is not a folder"):
        reqtable.TCPServer(("127.0.0.1", 0), files_of(tmp_path / "nothing"))


# -- while a file is sent ---------------------------------------------------------------------------------------------


def slow_request(server: Any, root: Path, size: int = 50_000_000) -> Asking:
    """Ask for a file that the client and the kernel can't take at once, and read only its head."""
    with (root / "slow.bin").open("wb") as file:
        file.truncate(size)
    os.utime(root / "slow.bin", (LONG_AGO, LONG_AGO))
    client = Asking(server.server_address)
    client.send(b"GET /slow.bin HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"200 OK" in client.head()
    wait_until(server, lambda: any(row["state"] == "WRITING" for row in server.table.snapshot()))
    return client


@pytest.mark.parametrize(
    ("change", "is_whole"), [("shrinks", False), ("is written to", False), ("grows", True), ("is replaced", True)]
)
def test_a_file_that_changes_while_it_is_sent(root: Path, change: str, is_whole: bool) -> None:
    size, place = 50_000_000, root / "slow.bin"
    before = open_descriptors()
    with served(files_of(root)) as server, slow_request(server, root) as client:
        if change == "shrinks":
            os.truncate(place, 1000)
        elif change == "is written to":
            with place.open("r+b") as file:
                file.write(b"x")
        elif change == "grows":
            with place.open("ab") as file:
                file.write(b"x" * 100)
        else:
            (root / "new").write_bytes(b"x" * size)
            (root / "new").rename(place)
        if is_whole:
            assert client.receive(size) == bytes(size)
            assert client.get("/page.html").status == 200
        else:
            assert len(client.rest()) < size
        client.close()
        wait_until(server, lambda: not len(server.table))
    assert open_descriptors() == before


@pytest.mark.parametrize("dispatch", ["inline", "pool"])
def test_the_file_is_closed_when_the_client_leaves(root: Path, dispatch: str) -> None:
    with served(files_of(root), dispatch) as server:
        get(server, "/page.html")
        wait_until(server, lambda: not len(server.table))
        before = open_descriptors()
        with slow_request(server, root) as client:
            assert open_descriptors() == before + 3  # both ends of the connection, and the file
            for _ in range(3):
                assert get(server, "/sub/deep/a.txt").body == b"0123456789", "others are served meanwhile"
            client.reset()
            wait_until(server, lambda: not len(server.table))
            assert open_descriptors() == before


@pytest.mark.parametrize("dispatch", ["inline", "pool"])
def test_a_download_that_the_client_breaks_off_is_logged(
    root: Path, dispatch: str, caplog: pytest.LogCaptureFixture
) -> None:
    ended: list[FileRequestHandler] = []
    site = type("Site", (files_of(root),), {"on_close": lambda handler: ended.append(handler)})
    caplog.set_level("INFO", "reqtable.access")
    with served(site, dispatch) as server:
        before = open_descriptors()
        with slow_request(server, root) as client:
            client.reset()
            wait_until(server, lambda: not len(server.table))
        assert open_descriptors() == before
    assert len(ended) == 1
    [line] = [each.request for each in caplog.records if each.name == "reqtable.access.http"]
    assert (line["status"], line["is_whole"]) == (200, False)


def test_a_small_file_that_changes_while_it_is_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, place = http_files._read, root / "page.html"
    contents = ["<p>one", "<p>one and", "<p>", "<p>four"]

    def reading(*args: Any) -> bytes:
        if contents:
            place.write_text(contents.pop(0))
        return read(*args)

    monkeypatch.setattr(http_files, "_read", reading)
    with served(files_of(root)) as server, Asking(server.server_address) as client:
        assert client.get("/page.html").status == 503  # three versions in a row
        found = client.get("/page.html")
        assert (found.status, found.body) == (200, b"<p>four")
