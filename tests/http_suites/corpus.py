"""The requests that gunicorn and llhttp test their parsers with, and where we differ from their verdicts on purpose.

The file is not part of this repository. REQTABLE_CORPORA names its folder; else it is sought beside the checkout.
"""

from __future__ import annotations

import base64
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

MISSING = "http_requests.jsonl is missing: set REQTABLE_CORPORA to its folder"
_BESIDE = Path(__file__).resolve().parents[3]


def path() -> Path | None:
    """Return the path of the corpus; None: there is none."""
    folders = [os.environ.get("REQTABLE_CORPORA"), _BESIDE / "shared" / "corpora"]
    found = [Path(each) / "http_requests.jsonl" for each in folders if each]
    return next((each for each in found if each.exists()), None)


@dataclass(frozen=True)
class Case:
    """Holds one input, and what its project says of it."""

    source: str
    data: bytes
    is_valid: bool
    requests: int  # how many complete requests a valid input has

    @property
    def project(self) -> str:
        return self.source.split()[0]

    def with_host(self) -> bytes:
        """Return the input with a Host in each head of HTTP/1.1, if it has none: without one, a request is invalid."""
        if re.search(rb"\nhost:", self.data, re.IGNORECASE):
            return self.data
        return self.data.replace(b" HTTP/1.1\r\n", b" HTTP/1.1\r\nHost: x\r\n")


def cases() -> list[Case]:
    found = path()
    assert found is not None
    lines = [json.loads(line) for line in found.read_text().splitlines()]
    return [
        Case(each["source"], base64.b64decode(each["bytes"]), each["verdict"] == "valid", each.get("requests", 0))
        for each in lines
    ]


# Invalid for them, answered by us.
ANSWERED = {
    "gunicorn tests/requests/invalid/006": "a limit that their test sets lower; the line is shorter than ours",
    "gunicorn tests/requests/invalid/011": "a limit that their test sets lower: two fields",
    "gunicorn tests/requests/invalid/012": "a limit that their test sets lower: the length of the head",
    "llhttp test/request/connection.md #3": "what follows Connection: close is never read: the first is answered",
    "llhttp test/request/invalid.md #4": "a method that they know for another protocol; it is a token (RFC 9110, 9.1)",
}

# Valid for them, refused by us: a part of our reason, and why.
REFUSED = {
    "a fragment in the target": "RFC 9112, 3.2: a target has no fragment; others cut it off, and see another path",
    "other characters than visible ASCII": "RFC 3986, 2: bytes above 127 are escaped",
    "more than one transfer-encoding": "two fields are two chances to read only one of them",
    "a Transfer-Encoding that": "no coding but chunked is undone here (RFC 9112, 6.1: 501)",
    "exceeds 8190 bytes": "a limit that their tests raise",
    "the method is not in capital letters": "no registered method has a small letter, or begins with a hyphen",
    "a field whose name is like one that frames": "as a variable of CGI it would be the Content-Length",
    "a header field that goes on in a second line": "RFC 9112, 5.2: obsolete, refused (400)",
    "the name of a header field has other characters": "RFC 9112, 5.1: white space before a colon MUST be refused",
    "the first line is no request line": "a PROXY header without the option `proxy`, RTSP, ICE, HTTP/0.9",
    "CONNECT is for proxies": "we are none",
    "the target is neither a path nor a whole URI": "RFC 9112, 3.2.4: * is for OPTIONS",
    "the Host is no host": "RFC 9110, 4.2.4: a user before the host is an error",
    "after the body": "RFC 9110, 6.5.1: no trailer says how to read the body that came before it",
    "before the request was complete": "the body is shorter than its Content-Length",
}
