"""Moves requests for real, at full size: `python -m tests.moving [--quick] [--seed N] [NAME...]`, or `make moving`.

Each run prints its figures, and what does not hold. The exit status is 1 if something does not.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

from tests.moving import aborts, kills, peers, points, restarts
from tests.moving.servers import NotStarted

Run = Callable[[bool, int], list[str]]  # whether it is quick, and the seed; returns what does not hold

RUNS: dict[str, Run] = {
    "stopped": restarts.stopped,
    "restarts": restarts.restarts,
    "aborts": aborts.aborts,
    "rows": restarts.rows,
    "generations": restarts.generations,
    "websockets": restarts.websockets,
    "upload": restarts.upload,
    "redis": restarts.redis,
    "kills": kills.kills,
    "points": points.points,
    "web-kills": kills.web_kills,
    "websocket-kills": kills.websocket_kills,
    "redis-killed": kills.redis_killed,
    "peers": peers.peers,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.moving", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(RUNS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="fewer restarts and clients: in minutes")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000, help="of the clients; default: random")
    given = parser.parse_args()
    if unknown := set(given.names) - set(RUNS):
        parser.error(f"no run is named {', '.join(sorted(unknown))}: there are {', '.join(RUNS)}")
    broken = []
    for name in given.names or RUNS:
        print(f"\n== {name} (seed {given.seed}): {(RUNS[name].__doc__ or '').partition(chr(10))[0]}", flush=True)
        try:
            found = RUNS[name](given.quick, given.seed)
        except NotStarted as error:
            found = [str(error)]
        print("\n".join(f"  DOES NOT HOLD: {each}" for each in found) or "  holds", flush=True)
        broken += [name] if found else []
    print(f"\ndo not hold: {', '.join(broken)}" if broken else "\nall hold")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
