"""The standard library's own test suites, with `socketserver` replaced: `python -m tests.compat [SUITE]...`.

Every suite runs three times: as it is, so that each server's class says how it is dispatched; with every handler under
`inline`; with every blocking handler under `greenlet`. The one test that is left out wants the classes' `__module__` to
be "socketserver".
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from reqtable.compat import REPLACEMENT, environment

QUICK = ["test_socketserver", "test_httpservers", "test_xmlrpc", "test_docxmlrpc", "test_wsgiref", "test_robotparser"]
QUICK += ["test_urllib2_localnet"]
SLOW = ["test_ssl", "test_logging", "test_imaplib"]
POLICIES = [None, "inline", "greenlet"]
LEFT_OUT = "test.test_socketserver.MiscTestCase.test_all"
SUITE_S = 300  # how long one may take


@dataclass
class Outcome:
    suite: str
    policy: str | None
    ran: int
    skipped: int
    seconds: float
    failure: str  # "" where all passed, otherwise what was printed

    def __str__(self) -> str:
        counts = f"{self.ran:4} ran  {self.skipped:3} skipped  {self.seconds:6.1f} s"
        return f"{self.suite:22} {self.policy or 'as it is':10} {counts}  {'FAILED' if self.failure else 'passed'}"


def run(suite: str, policy: str | None) -> Outcome:
    """Run one suite in an interpreter of its own."""
    command = [sys.executable, "-m", "test", "-v", "-u", "network", "--timeout", "60", "-i", LEFT_OUT, suite]
    started = time.monotonic()
    base = {name: value for name, value in os.environ.items() if not name.startswith("REQTABLE_")}
    with tempfile.TemporaryDirectory(prefix="reqtable-compat-") as folder:
        # The suites count threads, and begin to while a server starts; the one that looks on is tested elsewhere.
        (Path(folder) / "limits.toml").write_text("[limits]\nloop_stall_s = inf\n")
        base |= {"TMPDIR": folder, "REQTABLE_CONFIG": str(Path(folder) / "limits.toml")}
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment(policy, base),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        try:
            output, _ = process.communicate(timeout=SUITE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            output = process.communicate()[0] + f"\nnot done after {SUITE_S} s"
    ran = re.findall(r"^Ran (\d+) tests? in", output, re.MULTILINE)
    skipped = re.findall(r"^OK \(.*?skipped=(\d+)", output, re.MULTILINE)
    passed = process.returncode == 0 and ran and int(ran[-1]) > 0 and "env changed" not in output
    return Outcome(
        suite,
        policy,
        int(ran[-1]) if ran else 0,
        int(skipped[-1]) if skipped else 0,
        time.monotonic() - started,
        "" if passed else output,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.compat", description=__doc__)
    parser.add_argument("suites", nargs="*", help=f"which ones; by default {' '.join(SLOW + QUICK)}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many at a time")
    options = parser.parse_args()
    suites = options.suites or SLOW + QUICK
    if importlib.util.find_spec("test") is None or importlib.util.find_spec("test.test_socketserver") is None:
        print(f"skipped: Python {sys.version.split()[0]} at {sys.executable} ships without its own tests")
        return 0
    there = subprocess.run(
        [sys.executable, "-c", "import socketserver; print(socketserver.__file__)"],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert Path(there.stdout.strip()).parent == REPLACEMENT, f"socketserver is not replaced, it is {there.stdout}"
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = [pool.submit(run, suite, policy) for suite in suites for policy in POLICIES]
        outcomes = []
        for each in runs:
            outcomes.append(each.result())
            print(outcomes[-1], flush=True)
    failed = [each for each in outcomes if each.failure]
    for each in failed:
        print(f"\n---- {each}\n{each.failure}")
    count = sum(each.ran for each in outcomes)
    print(f"{count} tests in {len(outcomes)} runs on Python {sys.version.split()[0]}; {len(failed)} runs failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
