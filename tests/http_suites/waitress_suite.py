"""waitress's own functional tests against reqtable. `waitress_shim.py` puts reqtable in waitress's place."""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tests.http_suites.suite import ROOT, Failed, Skipped, output_of

RAN_MIN = 130

_FAILED = "an application that fails gets a 500 whose text begins with 500, and the connection is kept"
_TYPE = "str as a body is an error; nothing has left yet, so the client is answered 500, not with an empty 200"
_CHUNKED = "an answer in chunks says where it ends: the connection is kept"
_LENGTH = "the length of a list is known, however many items it has: it is sent, and the connection is kept"
_LINE = "a line that is too long and the first of a request is a request line: 414 is more exact than 431"

# The expectations that reqtable does not meet on purpose: the test and the reason. Each test runs over TCP and Unix.
DIFFERENT = {
    "EchoTests.test_proxy_headers": "a trusted proxy is believed in the X-Forwarded fields that reqtable does not use",
    "FileWrapperTests.test_filelike_longcl_http11": "a Content-Length that is too large is sent as it is, and logged; "
    "the connection closes",
    "FileWrapperTests.test_notfilelike_nocl_http11": _CHUNKED,
    "InternalServerErrorTests.test_after_start_response_http10": _FAILED,
    "InternalServerErrorTests.test_after_start_response_http11": _FAILED,
    "InternalServerErrorTests.test_after_start_response_http11_close": _FAILED,
    "InternalServerErrorTests.test_after_write_cb": _TYPE,
    "InternalServerErrorTests.test_before_start_response_http_10": _FAILED,
    "InternalServerErrorTests.test_before_start_response_http_11": _FAILED,
    "InternalServerErrorTests.test_before_start_response_http_11_close": _FAILED,
    "InternalServerErrorTests.test_in_generator": _TYPE,
    "InternalServerErrorTestsWithTraceback.test_expose_tracebacks_http_10": _FAILED,
    "InternalServerErrorTestsWithTraceback.test_expose_tracebacks_http_11": _FAILED,
    "NoContentLengthTests.test_http10_listlentwo": _LENGTH,
    "NoContentLengthTests.test_http11_generator": _CHUNKED,
    "NoContentLengthTests.test_http11_listlentwo": _LENGTH,
    "TooLargeTests.test_request_body_too_large_chunked_encoding": "a semicolon without an extension is no chunk: 400",
    "TooLargeTests.test_request_body_too_large_with_no_cl_http10_keepalive": _LINE,
    "TooLargeTests.test_request_body_too_large_with_no_cl_http11": _LINE,
    "TooLargeTests.test_request_body_too_large_with_wrong_cl_http10_keepalive": _LINE,
    "TooLargeTests.test_request_body_too_large_with_wrong_cl_http11": _LINE,
}
# These fail or pass, because two threads race.
SOMETIMES = {
    "WriteCallbackTests.test_no_content_length": "if the application has returned before the head is sent, the length "
    "of what it wrote is known: it is sent, and the connection is kept",
}


def run(quick: bool) -> str:
    folder = _release()
    shim = Path(__file__).with_name("waitress_shim.py")
    _, printed = output_of([sys.executable, "-W", "ignore", str(shim), str(folder)], folder)
    try:
        report = json.loads(printed.strip().rpartition("\n")[2])
    except ValueError:
        raise Failed(f"the tests did not run:\n{printed[-2000:]}") from None
    ran, failed = report["ran"], report["failed"]
    names = {each: each.removeprefix("Tcp").removeprefix("Unix") for each in failed}
    known = DIFFERENT | SOMETIMES
    wrong = [f"{each}: {why}" for each, why in failed.items() if names[each] not in known]
    wrong += [
        f"{kind}{each} passes: remove it from DIFFERENT"
        for each in DIFFERENT
        for kind in ("Tcp", "Unix")
        if kind + each not in failed
    ]
    if wrong or ran < RAN_MIN:
        raise Failed("\n".join([f"{len(failed)} of {ran} tests fail", *wrong]))
    reasons = [f"{each}: {known[each]}" for each in sorted(set(names.values()))]
    return "\n".join([f"{ran - len(failed)} of {ran} tests pass, {len(failed)} differ on purpose:", *reasons])


def _release() -> Path:
    """Return the folder of the source release of the waitress that is installed. Fetches it from PyPI once."""
    try:
        name = f"waitress-{version('waitress')}"
    except PackageNotFoundError:
        raise Skipped("waitress is missing: pip install '.[test]'") from None
    build = ROOT / "build" / "http-suites"
    if not (build / name / "tests").exists():
        build.mkdir(parents=True, exist_ok=True)
        fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        code, printed = output_of([*fetch, "--no-binary", ":all:", "--dest", str(build), name.replace("-", "==")])
        archive = build / f"{name}.tar.gz"
        if code or not archive.exists():
            raise Skipped(f"the source release of {name} can't be fetched from PyPI: {printed.strip()[-300:]}")
        output_of(["tar", "-xzf", str(archive), "-C", str(build)])
    return build / name
