"""Others restarted under the same load: what their clients lose, as docs/explanation/moving.md shows it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from tests.moving import servers
from tests.moving.load import Figures, Group, Load
from tests.moving.restarts import folder, restart_times, shown
from tests.moving.servers import NotStarted, Server

LINES = [Group("talk", 20), Group("churn", 8), Group("upload", 2), Group("download", 2)]
WEB = [Group("http-talk", 8), Group("http-churn", 4), Group("http-upload", 1), Group("http-download", 1)]
FILES = [Group("http-talk", 20), Group("http-churn", 8), Group("http-download", 2)]  # nginx drops uploads here

LOADS: list[tuple[type[Server], list[Group]]] = [
    (servers.Reqtable, LINES),
    (servers.ReqtableHttp, WEB),
    (servers.StoppedReqtable, LINES),
    (servers.ReloadedReqtable, LINES),
    (servers.Uvicorn, WEB),
    (servers.RestartedUvicorn, WEB),
    (servers.Gunicorn, WEB),
    (servers.UpgradedGunicorn, WEB),
    (servers.Nginx, FILES),
    (servers.UpgradedNginx, FILES),
    (servers.Haproxy, LINES),
    (servers.BoundedHaproxy, LINES),
]
HEADINGS = (
    "server", "restarts", "requests", "failed", "of them refused, reset, cut, wrong, stalled",
    "kept connections closed", "max ms", "processes before, after",
)  # fmt: skip


@dataclass
class Row:
    """Holds what one server has shown."""

    name: str
    restarts: int
    figures: Figures
    before: int
    after: int

    def cells(self) -> list[str]:
        each = self.figures.values()
        failures = [sum(own["failures"].get(name, 0) for own in each) for name in KINDS]
        failed = sum(sum(own["failures"].values()) for own in each)
        return [
            self.name,
            str(self.restarts),
            f"{sum(own['asked'] for own in each):,}",
            str(failed),
            ", ".join(map(str, failures)),
            str(sum(own["closed"] for own in each)),
            f"{max(own['max_ms'] for kind, own in self.figures.items() if kind in SHORT):.0f}",
            f"{self.before}, {self.after}",
        ]


KINDS = ("refused", "reset", "eof", "wrong", "stalled")
SHORT = ("talk", "churn", "http-talk", "http-churn")  # whose requests take no time by themselves


def peers(quick: bool, seed: int) -> list[str]:
    """Restart each under its load, and print the table. It shows what is; it has no gate."""
    times = 3 if quick else 20
    found, rows = [], []
    for make, groups in LOADS:
        try:
            with folder() as path, make(path) as server:
                before = len(server.processes())
                with Load(server.port, groups, seed) as load:
                    took = restart_times(server, times)
                    after = len(server.processes())
                    figures = load.end()
        except NotStarted as error:
            print(f"{make.name}: left out: {error}")
            continue
        print(f"{make.name}: {times} restarts in {sum(took):.1f} s\n{shown(figures)}", flush=True)
        rows.append(Row(make.name, times, figures, before, after))
        found += [f"{make.name}: {own['unaccounted']} unaccounted" for own in figures.values() if own["unaccounted"]]
    print(time.strftime("\nMeasured on %Y-%m-%d."))
    print("\n" + table([list(HEADINGS), ["---"] * len(HEADINGS), *(row.cells() for row in rows)]))
    return found


def table(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
