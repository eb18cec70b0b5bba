"""The pages that a newcomer reads first: the README, and the comparison. Their figures are those of the benchmark."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest

from tests import moving_picture

ROOT = Path(__file__).parent.parent
EXPLANATION = ROOT / "docs" / "explanation"
WORKS = json.loads((EXPLANATION / "performance" / "figures.json").read_text())["works"]


def kib(work: str, server: str) -> float:
    return statistics.median(each["kib"] for each in WORKS[work][server])


def cpu_us(work: str, server: str) -> float:
    return statistics.median(each["cpu_s"] / each["requests"] * 1e6 for each in WORKS[work][server])


def ratio(work: str, server: str, peer: str) -> float:
    """Return the median of the ratios of the same rounds."""
    pairs = zip(WORKS[work][server], WORKS[work][peer], strict=True)
    return statistics.median(
        each["cpu_s"] / each["requests"] / (other["cpu_s"] / other["requests"]) for each, other in pairs
    )


def line_with(page: Path, text: str) -> str:
    """Return the only line of the page that has `text`, with the two lines after it."""
    lines = page.read_text().splitlines()
    [number] = [number for number, each in enumerate(lines) if text in each]
    return lines[number] if lines[number].startswith("|") else " ".join(lines[number : number + 3])


IDLE = [
    ("idle", "socketserver-threading"),
    ("idle", "asyncio-protocol"),
    ("idle", "asyncio-streams"),
    ("idle", "gevent"),
    ("idle", "reqtable-state"),
    ("idle", "reqtable-async"),
]
LINES = [
    ("echo-50", "socketserver-threading"),
    ("echo-50", "asyncio-protocol"),
    ("echo-50", "asyncio-streams"),
    ("echo-50", "uvloop-protocol"),
    ("echo-50", "uvloop-streams"),
    ("echo-50", "gevent"),
    ("echo-50", "reqtable-state"),
    ("echo-50", "reqtable-async"),
]


@pytest.mark.parametrize(
    ("page", "text", "measured"),
    [
        (EXPLANATION / "compared.md", "memory of an idle connection, KiB", [kib(*each) for each in IDLE]),
        (EXPLANATION / "compared.md", "CPU for a 64-byte line, 50 clients, µs", [cpu_us(*each) for each in LINES]),
        (
            EXPLANATION / "compared.md",
            "uvloop is also faster with one connection",
            [ratio("echo-1", "reqtable-state", "uvloop-protocol")],
        ),
        (
            EXPLANATION / "why-a-table.md",
            "an idle connection takes",
            [kib("idle", "reqtable-state"), kib("idle", "reqtable-thread"), kib("idle", "reqtable-greenlet")],
        ),
        (ROOT / "README.md", "An idle connection takes", [kib("idle", "reqtable-state")]),
    ],
)
def test_the_figures_are_those_of_the_benchmark(page: Path, text: str, measured: list[float]) -> None:
    told = re.findall(r"(?<![\w-])\d+(?:\.\d+)?(?![\w-])", line_with(page, text).partition(text)[2])
    assert len(told) == len(measured), told
    for number, value in zip(told, measured, strict=True):
        decimals = len(number.partition(".")[2])
        assert abs(float(number) - value) <= 0.5 * 10**-decimals + 0.01, (number, value)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def rows_of(page: Path) -> list[list[str]]:
    return [line.split("|") for line in page.read_text().splitlines() if line.startswith("|")]


def test_each_row_of_the_comparison_speaks_of_every_peer() -> None:
    assert len({len(each) for each in rows_of(EXPLANATION / "compared.md")}) == 1


def test_the_moving_picture_can_be_made_again() -> None:
    frames = moving_picture.recorded()
    made = moving_picture.svg(frames)
    assert moving_picture.frames_in(made) == moving_picture.frames_in(moving_picture.FILE.read_text()) == len(frames)
    assert "<defs>" in made
    assert len(made) < 100_000
    for text in ("parsed(parse=whole_co", "call(sleep)", "has ended"):
        assert text in made
