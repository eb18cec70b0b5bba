"""Files over HTTP: curl and the command line as clients know them, and the same answers as nginx."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from reqtable.http.conditions import http_date
from tests.http_client import BIG, LONG_AGO, Asking, files_of, folder_in, get
from tests.support import WAIT_S, served
from tests.test_cli import port_of, reqtable_command, run

NOW, EARLIER = http_date(LONG_AGO), http_date(LONG_AGO - 1)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return folder_in(tmp_path)


def curl(server: Any, *arguments: str, path: str = "/page.html") -> str:
    host, port = server.server_address
    return subprocess.run(
        ["curl", "-sS", "--path-as-is", *arguments, f"http://{host}:{port}{path}"],
        capture_output=True, text=True, timeout=WAIT_S, check=True,
    ).stdout  # fmt: skip


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed: .ci/run installs it")
def test_curl(root: Path, tmp_path: Path) -> None:
    subprocess.run(["gzip", "-k", root / "page.html"], check=True)
    code = ("-o", os.devnull, "-w", "%{http_code}")
    with served(files_of(root)) as server:
        assert curl(server, "--compressed") == "<p>hello"
        assert "content-encoding: gzip" in curl(server, "--compressed", "-I").lower()
        assert curl(server, "-r", "3-6") == "hell"
        assert curl(server, "-z", NOW, *code) == "304"
        assert curl(server, "-z", EARLIER, *code) == "200"
        assert curl(server, "-L", path="/sub") == "the index"
        partly = tmp_path / "download"
        partly.write_bytes(BIG[:1000])
        curl(server, "-C", "-", "-o", str(partly), path="/big.bin")
        assert partly.read_bytes() == BIG
        curl(server, "--etag-save", str(tmp_path / "etag"))
        assert curl(server, "--etag-compare", str(tmp_path / "etag"), *code) == "304"


COMPARED: list[tuple[str, str, dict[str, str]]] = [
    *[("GET", path, {}) for path in ("/page.html", "/sub/", "/sub", "/sub?x=1", "/sub/deep/", "/sub/deep/a.txt/")],
    *[("GET", path, {}) for path in ("/nothing", "//sub//deep/a.txt", "/%70age.html", "/.hidden", "/big.bin")],
    *[("GET", "/big.bin", {"range": f"bytes={each}"}) for each in ("5-9", "-9", "5-", "9999999-")],
    ("GET", "/page.html", {"if_modified_since": NOW}),
    ("GET", "/page.html", {"if_unmodified_since": EARLIER}),
    ("GET", "/page.html", {"if_none_match": "*"}),
    ("GET", "/page.html", {"if_match": '"x"'}),
    ("GET", "/page.html", {"range": "bytes=0-1", "if_range": '"x"'}),
    ("HEAD", "/page.html", {}),
    ("POST", "/page.html", {}),
]

NGINX = """daemon off; master_process off; pid {0}/pid; error_log {0}/error.log; events {{}}
http {{ access_log off; client_body_temp_path {0}/a; proxy_temp_path {0}/b; fastcgi_temp_path {0}/c;
uwsgi_temp_path {0}/d; scgi_temp_path {0}/e; types {{ text/html html; text/plain txt; }} charset utf-8;
default_type application/octet-stream; absolute_redirect off; disable_symlinks on from=$document_root;
server {{ listen unix:{0}/s; root {1}; gzip_static on; gzip_vary on; location ~ /\\. {{ return 404; }} }} }}
"""


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed: .ci/run installs it")
def test_nginx_answers_the_same(root: Path, tmp_path: Path) -> None:
    for each in [tmp_path, *root.rglob("*")]:
        each.chmod(0o755)
    (tmp_path / "conf").write_text(("user root;" if os.geteuid() == 0 else "") + NGINX.format(tmp_path, root))
    place = os.path.relpath(tmp_path / "s")
    process = subprocess.Popen(["nginx", "-e", tmp_path / "log", "-c", tmp_path / "conf"], stderr=subprocess.PIPE)
    try:
        until = time.monotonic() + WAIT_S
        while not (tmp_path / "s").exists():
            assert process.poll() is None, (process.stderr and process.stderr.read(), (tmp_path / "log").read_text())
            assert time.monotonic() < until
        for method, path, fields in COMPARED:
            answers = []
            with Asking(place, socket.AF_UNIX) as client:
                answers.append(client.get(path, method, **fields))
            with served(files_of(root, lists_folders=False)) as server:
                answers.append(get(server, path, method, **fields))
            compared = [
                (each.status, [each.fields.get(name) for name in ("content-range", "location", "last-modified")])
                for each in answers
            ]
            assert compared[0] == compared[1], (method, path, fields)
            if compared[0][0] in (200, 206):
                assert answers[0].body == answers[1].body
                assert answers[0].fields["content-length"] == answers[1].fields["content-length"]
                assert answers[0].fields["content-type"] == answers[1].fields["content-type"]
    finally:
        process.terminate()
        process.communicate()


def test_the_command(root: Path, tmp_path: Path) -> None:
    (root / ".hidden").write_text("x")
    (root / "link_out").symlink_to(tmp_path / "secret")
    bind = ("--bind", "tcp://127.0.0.1:0")
    for options, statuses in {
        (): (200, 404, 403, None),
        ("--no-listing", "--dot-files", "--follow-symlinks", "--cache", "7"): (403, 200, 200, "max-age=7"),
    }.items():
        with reqtable_command("http", str(root), *bind, *options) as (_, [line]):
            assert line.startswith("serving Files on tcp://127.0.0.1:")
            with Asking(("127.0.0.1", port_of(line))) as client:
                found = tuple(client.get(path).status for path in ("/", "/.hidden", "/link_out"))
                assert (*found, client.get("/page.html").fields.get("cache-control")) == statuses


def test_usage_of_the_command(tmp_path: Path) -> None:
    assert "tcp://127.0.0.1:8000" in " ".join(run("http", "--help").stdout.split())
    result = run("http", str(tmp_path / "nothing"))
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "does not exist" in result.stderr
