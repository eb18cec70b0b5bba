"""`testssl` against a TLS bind: no finding of severity HIGH or CRITICAL, but what belongs to a certificate of tests."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tests.certificates import write_certificate
from tests.http_suites.suite import Failed, Reqtable, output_of, program

# What is said of the certificate: the tests' own authority has made it a moment ago.
_CERTIFICATE = {
    "cert_chain_of_trust": "no browser knows the authority of the tests",
    "cert_extlifeSpan": "the certificates of tests are valid for centuries",
    "cert_validityPeriod": "the certificates of tests are valid for centuries",
    "cert_revocation": "the authority of the tests revokes nothing",
}

_QUICK = ["-p", "-s", "-f", "-P", "-S", "-h", "-U"]  # all but the simulation of browsers


def run(quick: bool) -> str:
    path = program("testssl", "testssl.sh")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "index.html").write_bytes(b"hello\n")
        certificate, report = write_certificate(folder), folder / "report.json"
        with Reqtable("http", made, bind=f"tls://127.0.0.1:0?cert={certificate}&key={certificate}") as server:
            options = ["--quiet", "--color", "0", "--warnings", "off", "--nodns", "none", "--jsonfile", str(report)]
            options += _QUICK if quick else []
            _, printed = output_of([path, *options, server.address])
        findings = json.loads(report.read_text())
    if findings[-1]["id"] != "scanTime":
        raise Failed(f"testssl has not come to its end:\n{printed[-2000:]}")
    severe = [each for each in findings if each["severity"] in ("HIGH", "CRITICAL", "FATAL")]
    ours = [f"{each['severity']} {each['id']}: {each['finding']}" for each in severe if each["id"] not in _CERTIFICATE]
    if ours:
        raise Failed("\n".join([f"{len(ours)} of {len(findings)} findings are severe", *ours]))
    return "\n".join(
        [
            f"of {len(findings)} findings none of severity HIGH or CRITICAL is the server's",
            *[f"{each['severity']} {each['id']}: {each['finding']}: {_CERTIFICATE[each['id']]}" for each in severe],
        ]
    )
