"""`curl` as people use it: ranges, resumed downloads, compression, uploads, and several URLs on one connection."""

from __future__ import annotations

import gzip
import re
import tempfile
from pathlib import Path

from tests.certificates import write_certificate
from tests.http_suites.suite import Failed, Reqtable, output_of, program

_DATA = bytes(range(256)) * 4096  # 1 MiB
_PAGE = b"<p>hello</p>\n" * 500


class _Curl:
    """Runs curl in a folder, and counts what it has checked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done = 0
        self._path = program("curl", "curl")

    def get(self, *arguments: str, out: str = "out") -> tuple[bytes, str]:
        """Return what curl has written to the file `out`, and what it printed. Raises Failed if it fails."""
        code, printed = output_of([self._path, "-sS", "-m", "20", "-o", out, *arguments], self.folder)
        if code:
            raise Failed(f"curl {' '.join(arguments)} exits with {code}: {printed[-1000:]}")
        return (self.folder / out).read_bytes(), printed

    def expect(self, what: str, found: object, expected: object) -> None:
        if found != expected:
            raise Failed(f"{what}: {str(found)[:300]}, not {str(expected)[:300]}")
        self.done += 1


def run(quick: bool) -> str:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        site = folder / "site"
        site.mkdir()
        (site / "data.bin").write_bytes(_DATA)
        (site / "page.html").write_bytes(_PAGE)
        (site / "page.html.gz").write_bytes(gzip.compress(_PAGE))
        curl = _Curl(folder)
        with Reqtable("http", str(site)) as server:
            _download(curl, f"http://{server.address}")
        certificate = write_certificate(folder)
        bind = f"tls://127.0.0.1:0?cert={certificate}&key={certificate}"
        with Reqtable("http", str(site), bind=bind) as server:
            authority = ["--cacert", str(folder / "ca.pem")]
            url = f"https://{server.address}/data.bin"
            curl.expect("over TLS", curl.get(*authority, url)[0], _DATA)
            _keep_alive(curl, url, *authority)
        with Reqtable("http", str(site), bind="tcp://127.0.0.1:0?proxy=127.0.0.1") as server:
            url = f"http://{server.address}/page.html"
            curl.expect("a PROXY header", curl.get("--haproxy-protocol", url)[0], _PAGE)
        with Reqtable("wsgi", "tests.http_suites.peers:wsgi") as server:
            _upload(curl, f"http://{server.address}", site / "data.bin")
    return f"{curl.done} answers are as expected"


def _download(curl: _Curl, site: str) -> None:
    data, page = f"{site}/data.bin", f"{site}/page.html"
    curl.expect("a range", curl.get("-r", "100-299", data)[0], _DATA[100:300])
    curl.expect("the last bytes", curl.get("-r", "-77", data)[0], _DATA[-77:])
    parts = curl.get("-r", "0-1,300-303", data)[0]
    curl.expect("two ranges", [each in parts for each in (b"\0\1\r\n", b"\x2c\x2d\x2e\x2f\r\n")], [True, True])
    (curl.folder / "half").write_bytes(_DATA[:400_000])
    curl.expect("a resumed download", curl.get("-C", "-", data, out="half")[0], _DATA)
    found, size = curl.get("--compressed", "-w", "%{size_download}", page)
    curl.expect("a compressed page", (found, int(size) < len(_PAGE)), (_PAGE, True))
    head = curl.get("-I", data)[0].lower()
    curl.expect("-I", (b"content-length: 1048576\r\n" in head, head.endswith(b"\r\n\r\n")), (True, True))
    curl.expect("HTTP/1.0", curl.get("--http1.0", data)[0], _DATA)
    etag = str(curl.folder / "etag")
    curl.get("--etag-save", etag, page)
    _, code = curl.get("--etag-compare", etag, "-w", "%{http_code}", page)
    curl.expect("the same ETag", code, "304")
    _, code = curl.get("-z", str(curl.folder / "site" / "page.html"), "-w", "%{http_code}", page)
    curl.expect("not modified since", code, "304")
    _, code = curl.get("--path-as-is", "-w", "%{http_code}", f"{site}/../etag")
    curl.expect("a path that leads out", code, "404")
    _keep_alive(curl, data)


def _keep_alive(curl: _Curl, url: str, *options: str) -> None:
    """Get a URL five times: all of them by one connection."""
    more = [word for _ in range(4) for word in ("-o", "/dev/null", url)]
    _, printed = curl.get(*options, "-w", "%{num_connects} %{http_code}\n", url, *more)
    curl.expect("five URLs", printed.split("\n")[:-1], ["1 200", *["0 200"] * 4])


def _upload(curl: _Curl, site: str, file: Path) -> None:
    for options in ([], ["-H", "Transfer-Encoding: chunked"], ["--http1.0"]):
        expects = [] if options == ["--http1.0"] else ["-H", "Expect: 100-continue"]
        answer, printed = curl.get("-v", *options, *expects, "-T", str(file), f"{site}/up")
        curl.expect(f"-T with {options}", answer, b"<PUT /up %d>" % len(_DATA))
        if expects:
            curl.expect("100 Continue", bool(re.search(r"< HTTP/1\.1 100 Continue", printed)), True)
    curl.expect("a form", curl.get("-d", "a=b", f"{site}/form")[0], b"<POST /form 3>")
