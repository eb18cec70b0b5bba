"""Restarts that must fail: the new code is broken in one way or another, and the old process serves as before."""

from __future__ import annotations

from collections.abc import Callable

from tests.moving import versions
from tests.moving.load import Load
from tests.moving.restarts import MIXED, faults, folder, last_version, shown
from tests.moving.servers import NotStarted, Reqtable

ROWS = sum(count for kind, count, _ in MIXED if kind != "churn")
DIES = (
    "import os\n        cls.calls = getattr(cls, 'calls', 0) + 1\n        cls.calls > {calls} and os._exit(1)\n        "
)
FIELDS = "fields = {name: value"  # the first words of `migrate`

BROKEN: dict[str, Callable[[str], str]] = {
    "does not compile": lambda text: text.replace("class Ledger(", "class Ledger(("),
    "has no such class": lambda text: text.replace("class Ledger(", "class Other("),
    "hangs before it is ready": lambda text: "import time\ntime.sleep(600)\n" + text,
    "has no migrate": lambda text: text.replace("def migrate(", "def other("),
    "fails in migrate": lambda text: text.replace(FIELDS, "1 / 0\n        " + FIELDS),
    "migrates to a state that it does not have": lambda text: text.replace(".get(state, state)", ".get('', 'nowhere')"),
    "dies in the rehearsal": lambda text: text.replace(FIELDS, DIES.format(calls=ROWS // 2) + FIELDS),
    "dies with requests in its hands": lambda text: text.replace(FIELDS, DIES.format(calls=ROWS + ROWS // 2) + FIELDS),
}


class Aborting(Reqtable):
    """Waits for a new process for a shorter time."""

    @property
    def options(self) -> tuple[str, ...]:  # type: ignore[override]
        path = self.folder / "reqtable.toml"
        path.write_text("[restart]\nstart_timeout_s = 10\n")
        return "--config", str(path)

    def fail_to_restart(self, breaking: Callable[[str], str]) -> str:
        """Restart with broken code. Returns what the command says. Raises AssertionError if the restart succeeds."""
        before = self.processes()
        versions.write_ledger(self.path, self.version + 1)
        whole = self.path.read_text()
        self.path.write_text(breaking(whole))
        assert self.path.read_text() != whole
        try:
            self.ask("restart")
        except NotStarted as error:
            self.wait_gone([pid for pid in self.processes() if pid not in before])
            assert self.processes() == before, f"{before} were before, now there are {self.processes()}"
            return str(error).partition("\n")[0]
        raise AssertionError("the restart succeeded")


def aborts(quick: bool, seed: int) -> list[str]:
    """Each broken version is refused, and no client notices. Then a restart with whole code succeeds."""
    found = []
    for name, breaking in BROKEN.items():
        with folder() as path, Aborting(path) as server, Load(server.port, MIXED, seed) as load:
            try:
                said = [server.fail_to_restart(breaking) for _ in range(1 if quick else 3)]
                print(f"a version that {name}: {said[0]}", flush=True)
                server.restart()
            except (AssertionError, NotStarted) as error:
                found.append(f"{name}: {error}")
            figures = load.end()
        wrong = faults(figures) + last_version(figures, server.version)
        found += [f"{name}: {each}" for each in wrong]
        if wrong:
            print(shown(figures))
    return found
