"""The Autobahn cases for WebSockets, as PyPI's `kosoku` runs them."""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from reqtable.http import WebSocketHandler
from reqtable.http.deflate import deflate
from reqtable.http.frames import build_frame
from tests.http_suites.suite import Failed, Reqtable, Skipped, output_of

# The sections 12 and 13 send 1,000 compressed messages in each of 216 cases, which takes minutes: of the 18 sizes and
# fragmentations, these are left in with `--quick`.
_QUICK = (1, 5, 12)
_PASSED = {"OK", "NON-STRICT", "INFORMATIONAL"}


class Echo(WebSocketHandler):
    """Sends each message back. Compresses all of them if the client offers compression, however short they are.

    kosoku 0.1.0 fails in its sections 12 and 13 with an error of its own at an answer that is not compressed, although
    the server chooses that for each message (RFC 7692, 6).
    """

    message_bytes_max = 32 * 2**20

    def on_message(self, message: str | bytes) -> None:
        if isinstance(message, str):
            self.send_text(message)
        else:
            self.send_bytes(message)

    def _send_message(self, opcode: int, payload: bytes) -> Any:
        assert self.websocket is not None
        bits = self.websocket.window_bits
        if not bits:
            return super()._send_message(opcode, payload)
        return self.send(build_frame(opcode, deflate(payload, bits), rsv1=True))


def run(quick: bool) -> str:
    kosoku = Path(sys.executable).with_name("kosoku")
    if not kosoku.exists():
        raise Skipped("kosoku is missing: pip install '.[http-suites]'")
    left_out = [size for size in range(1, 19) if quick and size not in _QUICK]
    options = [word for size in left_out for word in ("-x", f"12.*.{size}", "-x", f"13.*.{size}")]
    with tempfile.TemporaryDirectory() as folder, Reqtable("serve", f"{__name__}:Echo") as server:
        _, printed = output_of([str(kosoku), "-p", "4", "-o", folder, *options, server.address])
        try:
            (found,) = json.loads((Path(folder) / "index.json").read_text()).values()
        except OSError:
            raise Failed(f"kosoku has written no report:\n{printed[-2000:]}") from None
    ran, passed, failed = Counter[int](), Counter[int](), []
    for case, each in found.items():
        section = int(case.partition(".")[0])
        ran[section] += 1
        if each["behavior"] in _PASSED and each["behaviorClose"] in _PASSED:
            passed[section] += 1
        else:
            failed.append(f"{case}: {each['behavior']}, {each['behaviorClose']} at the close")
    if failed or not ran:
        raise Failed("\n".join([f"{len(failed)} of {len(found)} cases", *failed]))
    sections = ", ".join(f"{section}: {passed[section]}" for section in sorted(ran))
    return f"all of {len(found)} cases pass; by section {sections}"
