"""`python -m examples.cluster` starts the example, and ends it at Ctrl-C or SIGTERM."""

import argparse
import signal
import tempfile
from contextlib import suppress
from pathlib import Path

from examples.cluster.together import Together


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.cluster", description=__doc__)
    parser.add_argument("--workers", type=int, default=2, help="how many workers the cluster has; 2")
    parser.add_argument("--port", type=int, default=7000, help="where HAProxy listens; 7000. 0: a free port")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with (
        suppress(KeyboardInterrupt),
        tempfile.TemporaryDirectory(prefix="reqtable-cluster-") as folder,
        Together(Path(folder), given.workers, given.port) as together,
    ):
        print(*together.lines(), "Ctrl-C ends all of them.", sep="\n", flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
