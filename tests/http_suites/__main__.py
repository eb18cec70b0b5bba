"""Runs the HTTP suites that others wrote, one after the other: `python -m tests.http_suites [--quick] [SUITE]...`.

Prints a line of figures for each. The exit status is 1 if one fails. A suite whose program is missing is skipped.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from tests.http_suites import autobahn, corpora, curl, differential, load, slow_clients, tls, validator, waitress_suite
from tests.http_suites.suite import Failed, Skipped

# Each suite returns its figures, in one line, and perhaps details in further lines. With each: its limit in seconds.
SUITES: dict[str, tuple[Callable[[bool], str], int]] = {
    "corpora": (corpora.run, 60),
    "differential": (differential.run, 300),
    "waitress": (waitress_suite.run, 180),
    "validator": (validator.run, 120),
    "autobahn": (autobahn.run, 900),
    "load": (load.run, 120),
    "slow-clients": (slow_clients.run, 90),
    "tls": (tls.run, 400),
    "curl": (curl.run, 60),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.http_suites", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="leave out what takes minutes")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"{', '.join(SUITES)}; without any: all")
    arguments = parser.parse_args()
    if unknown := set(arguments.suites) - set(SUITES):
        parser.error(f"no such suite: {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGALRM, _too_late)
    outcomes = [_run(name, arguments.quick) for name in arguments.suites or SUITES]
    return 0 if all(outcomes) else 1


def _run(name: str, quick: bool) -> bool:
    """Run a suite and print its line. Returns False if it fails."""
    run, limit_s = SUITES[name]
    began = time.monotonic()
    signal.alarm(limit_s)
    try:
        figures, failed = run(quick), False
    except Skipped as reason:
        figures, failed = f"skipped: {reason}", False
    except Failed as reason:
        figures, failed = f"FAILED: {reason}", True
    except Exception:
        figures, failed = f"FAILED:\n{traceback.format_exc()}", True
    finally:
        signal.alarm(0)
    first, *details = figures.split("\n")
    print(f"{name + ':':14}{first} [{time.monotonic() - began:.0f} s]", *details, sep="\n    ", flush=True)
    return not failed


def _too_late(*_: Any) -> None:
    raise Failed("the suite is not done in its time")


if __name__ == "__main__":
    sys.exit(main())
