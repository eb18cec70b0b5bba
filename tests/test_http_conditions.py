"""Files over HTTP: media types, compressed siblings, conditions and ranges."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reqtable.http.conditions import RANGES_MAX, Range, Validators, http_date, precondition, ranges_of, seconds_of
from reqtable.http.files import SMALL_BYTES
from reqtable.http.media_types import codings_of, type_of
from tests.http_client import BIG, LONG_AGO, Asking, files_of, folder_in
from tests.support import served


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return folder_in(tmp_path)


# -- media types and codings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "media_type"),
    [
        (b".HTML", "text/html; charset=utf-8"),
        (b".mjs", "text/javascript; charset=utf-8"),
        (b".json", "application/json"),
        (b".svg", "image/svg+xml"),
        (b".wasm", "application/wasm"),
        (b".gz", "application/gzip"),
        (b".\xff", "application/octet-stream"),
        (b"", "application/octet-stream"),
    ],
)
def test_media_types(suffix: bytes, media_type: str) -> None:
    assert type_of(suffix) == media_type


@pytest.mark.parametrize(
    ("accepted", "codings"),
    [
        ("", ()),
        ("gzip", ("gzip",)),
        ("gzip, deflate, br, zstd", ("br", "zstd", "gzip")),
        ("br;q=0.5, GZIP;q=0.9", ("gzip", "br")),
        ("gzip;q=0, *;q=0.1", ("br", "zstd")),
        ("identity, gzip;q=0.5", ()),
        ("identity;q=0.1, gzip;q=0.5", ("gzip",)),
        ("*", ("br", "zstd", "gzip")),
        ("gzip;q=x, br ; Q=1", ("br",)),
        ("gzip;q=2", ()),
        ("gzip;q=nan", ()),
    ],
)
def test_codings(accepted: str, codings: tuple[str, ...]) -> None:
    assert codings_of(accepted) == codings


def test_compressed_siblings(root: Path, tmp_path: Path) -> None:
    for name, text in {
        "page.html.gz": "gzipped",
        "page.html.br": "brotli",
        "big.bin.gz": "x" * SMALL_BYTES * 3,
    }.items():
        (root / name).write_text(text)
    (root / "sub" / "index.html.gz").write_text("older")
    os.utime(root / "sub" / "index.html.gz", (LONG_AGO - 1, LONG_AGO - 1))
    (root / "sub" / "index.html.br").symlink_to(tmp_path / "secret")
    (root / "photo.png").write_text("plain")
    (root / "photo.png.gz").write_text("never")
    os.mkfifo(root / "empty.gz")
    os.link(root / "sub" / "deep" / "a.txt", root / "sub" / "deep" / "a.txt.gz")  # one inode
    with served(files_of(root)) as server, Asking(server.server_address) as client:
        plain, gzipped = client.get("/page.html"), client.get("/page.html", accept_encoding="gzip")
        assert gzipped.body == b"gzipped"
        assert (gzipped.fields["content-encoding"], gzipped.fields["content-type"][:9]) == ("gzip", "text/html")
        assert plain.fields["vary"] == gzipped.fields["vary"] == "Accept-Encoding"
        assert plain.fields["etag"] != gzipped.fields["etag"]
        tag = gzipped.fields["etag"]
        assert client.get("/page.html", accept_encoding="gzip", if_none_match=tag).status == 304
        assert client.get("/page.html", if_none_match=tag).status == 200
        assert client.get("/page.html", accept_encoding="gzip, br").body == b"brotli"
        assert client.get("/page.html", accept_encoding="gzip", range="bytes=0-1").body == b"gz"
        assert client.get("/big.bin", accept_encoding="gzip").fields["content-encoding"] == "gzip"
        assert client.get("/sub/", accept_encoding="gzip, br").body == b"the index"
        assert client.get("/photo.png", accept_encoding="gzip").body == b"plain"
        assert "vary" not in client.get("/photo.png").fields
        assert client.get("/empty", accept_encoding="gzip").body == b""
        assert client.get("/page.html.gz").fields["content-type"] == "application/gzip"
        assert "content-encoding" not in client.get("/page.html.gz").fields
        tags = {client.get("/sub/deep/a.txt", accept_encoding=each).fields["etag"] for each in ("gzip", "br")}
        assert len(tags) == 2


# -- conditions and ranges --------------------------------------------------------------------------------------------

VERSION = Validators('"v"', LONG_AGO, LONG_AGO + 100)
NOW, LATER, EARLIER = http_date(LONG_AGO), http_date(LONG_AGO + 1), http_date(LONG_AGO - 1)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({}, None),
        ({"if-none-match": '"v"'}, 304),
        ({"if-none-match": 'W/"v"'}, 304),
        ({"if-none-match": '"a,b" , , "v"'}, 304),
        ({"if-none-match": "*"}, 304),
        ({"if-none-match": '"w"'}, None),
        ({"if-none-match": '"v'}, None),
        ({"if-none-match": "v"}, None),
        ({"if-none-match": '"w"', "if-modified-since": LATER}, None),
        ({"if-modified-since": NOW}, 304),
        ({"if-modified-since": LATER}, 304),
        ({"if-modified-since": EARLIER}, None),
        ({"if-modified-since": "yesterday"}, None),
        ({"if-match": '"v"'}, None),
        ({"if-match": "*"}, None),
        ({"if-match": 'W/"v"'}, 412),
        ({"if-match": '"w"'}, 412),
        ({"if-match": '"v"', "if-unmodified-since": EARLIER}, None),
        ({"if-match": '"v"', "if-none-match": '"v"'}, 304),
        ({"if-match": '"w"', "if-none-match": '"v"'}, 412),
        ({"if-unmodified-since": EARLIER}, 412),
        ({"if-unmodified-since": NOW}, None),
        ({"if-unmodified-since": EARLIER, "if-none-match": '"v"'}, 412),
    ],
)
def test_conditions(fields: dict[str, str], status: int | None) -> None:
    assert precondition(fields, VERSION) == status


@pytest.mark.parametrize(
    ("date", "seconds"),
    [
        ("Sun, 06 Nov 1994 08:49:37 GMT", 784111777),
        ("Sunday, 06-Nov-94 08:49:37 GMT", 784111777),
        ("Sun Nov  6 08:49:37 1994", 784111777),
        ("Sun, 06 Nov 1994 08:49:37 +0100", None),
        ("Sun, 06 Nix 1994 08:49:37 GMT", None),
        ("Sun, 06 Nov 1994 28:49:37 GMT", None),
        ("784111777", None),
        ("", None),
    ],
)
def test_dates(date: str, seconds: int | None) -> None:
    assert seconds_of(date) == seconds


@pytest.mark.parametrize(
    ("wanted", "ranges"),
    [
        ("bytes=0-4", [Range(0, 5)]),
        ("bytes=7-", [Range(7, 3)]),
        ("bytes=-3", [Range(7, 3)]),
        ("bytes=-30", [Range(0, 10)]),
        ("bytes=5-500", [Range(5, 5)]),
        ("Bytes = 1-1", [Range(1, 1)]),
        ("bytes=10-", []),
        ("bytes=-0", []),
        ("bytes=0-1, 20-30,,-1", [Range(0, 2), Range(9, 1)]),
        ("bytes=4-2", None),
        ("bytes=-", None),
        ("bytes=", None),
        ("bytes=a-b", None),
        ("bytes=0-1;2-3", None),
        ("bytes=+1-2", None),
        ("lines=0-4", None),
        ("bytes=0-8,0-8", None),  # more than there is
        ("bytes=" + ",".join(["0-0"] * 10), [Range(0, 1)] * 10),
        ("bytes=" + ",".join(["0-0"] * 17), None),
        ("bytes=" + "9" * 19 + "-", []),
        ("bytes=4-" + "9" * 19, [Range(4, 6)]),
        ("bytes=-" + "9" * 1000, [Range(0, 10)]),
        ("bytes=4-" + "9" * 5000, None),
    ],
)
def test_ranges(wanted: str, ranges: list[Range] | None) -> None:
    assert ranges_of({"range": wanted}, VERSION, 10) == ranges


@given(st.text("0123456789-,= \tbytes", max_size=60), st.integers(0, 50))
def test_any_ranges(text: str, size: int) -> None:
    for wanted in (text, f"bytes={text}"):
        ranges = ranges_of({"range": wanted}, VERSION, size) or []
        assert sum(each.length for each in ranges) <= size
        assert len(ranges) <= RANGES_MAX
        assert all(0 <= each.start < each.start + each.length <= size for each in ranges)


@given(st.text(alphabet=st.characters(max_codepoint=255), max_size=60))
def test_any_text_in_a_field(text: str) -> None:
    assert set(codings_of(text)) <= {"br", "zstd", "gzip"}
    for name in ("if-match", "if-none-match", "if-modified-since", "if-unmodified-since"):
        assert precondition({name: text}, VERSION) in (None, 304, 412)


@pytest.mark.parametrize(
    ("if_range", "is_part"),
    [('"v"', True), ('W/"v"', False), ('"w"', False), (NOW, True), (LATER, False), (EARLIER, False), ("x", False)],
)
def test_if_range(if_range: str, is_part: bool) -> None:
    fields = {"range": "bytes=0-1", "if-range": if_range}
    assert ranges_of(fields, VERSION, 10) == ([Range(0, 2)] if is_part else None)
    if if_range == NOW:  # a date of this second is weak
        assert ranges_of(fields, VERSION._replace(now=LONG_AGO), 10) is None


def test_ranges_over_http(root: Path) -> None:
    with served(files_of(root)) as server, Asking(server.server_address) as client:
        whole = client.get("/big.bin")
        assert (whole.fields["accept-ranges"], whole.fields["last-modified"]) == ("bytes", NOW)
        part = client.get("/big.bin", range="bytes=-5", if_range=whole.fields["etag"])
        assert (part.status, part.body, part.fields["content-range"]) == (
            206,
            BIG[-5:],
            "bytes 1048571-1048575/1048576",
        )
        none = client.get("/big.bin", range="bytes=2000000-")
        assert (none.status, none.fields["content-range"]) == (416, "bytes */1048576")
        assert client.get("/empty", range="bytes=0-").status == 200
        assert client.get("/big.bin", "HEAD", range="bytes=0-1").status == 200
        assert client.get("/big.bin", range="bytes=0-1", if_none_match=whole.fields["etag"]).status == 304
        assert client.get("/big.bin", if_match='"x"').status == 412
        for wanted in ("bytes=0-9, 5-6, -1", "bytes=0-199999, 300000-600000, 1-1"):
            several = client.get("/big.bin", range=wanted)
            assert several.status == 206
            [boundary] = re.findall("^multipart/byteranges; boundary=(.*)", several.fields["content-type"])
            first, *parts, last = several.body.split(b"--" + boundary.encode())
            assert (first, last, len(parts)) == (b"", b"--\r\n", 3)
            for part in parts:
                head, _, data = part.partition(b"\r\n\r\n")
                start, end = map(int, re.findall(rb"bytes (\d+)-(\d+)/1048576", head)[0])
                assert data == BIG[start : end + 1] + b"\r\n"
