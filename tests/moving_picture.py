"""Records `reqtable top` while an operator finds a stuck request and ends it, as a moving picture for the README.

python -m tests.moving_picture [FILE]     write docs/pictures/top.svg, or FILE

The server, its clients and the screen are real. A terminal in memory (pyte) has what `reqtable top` writes; each screen
that the script keeps becomes a frame of an SVG, and a style sheet shows the frames in turn.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyte

from tests.support import WAIT_S, Started
from tests.test_top_screen import Terminal

ROOT = Path(__file__).parent.parent
FILE = ROOT / "docs" / "pictures" / "top.svg"
COLUMNS, LINES = 96, 26
CHARACTER, LINE, MARGIN = 8.4, 18, 14  # pixels, with a font of 14

PROGRAM = """
import time
import reqtable
from examples.miniredis import MiniRedis
from examples.notes import Notes
from reqtable import call, line, state

class Orders(reqtable.StateRequestHandler):
    order: str = ""

    @state(line())
    def ordered(self, text):
        self.order = text.decode().strip()
        return self.paid, call(time.sleep, 3600)  # a payment that never comes

    @state()
    def paid(self, _):
        return None

served = {"tcp://127.0.0.1:0": Orders, "tcp://127.0.0.2:0": Notes, "tcp://127.0.0.3:0": MiniRedis}
reqtable.serve(served)
"""

COLOURS = {
    "default": "#d8dee9", "black": "#6b7686", "red": "#f07178", "green": "#a3d977", "brown": "#e6c06c",
    "blue": "#74a8f5", "magenta": "#c79bf0", "cyan": "#6fd0d8", "white": "#d8dee9", "brightblack": "#8a94a3",
    "brightred": "#ff8f96", "brightblue": "#93bdff",
}  # fmt: skip
GROUND = "#1b2129"


@dataclass(frozen=True, slots=True)
class Run:
    """Holds neighbouring characters of a line that look the same."""

    column: int
    text: str
    colour: str
    is_bold: bool
    is_reversed: bool


Frame = tuple[tuple[Run, ...], ...]


# -- recording --------------------------------------------------------------------------------------------------------


def recorded() -> list[tuple[float, Frame]]:
    """Return the frames, and how many seconds each is shown."""
    frames: list[tuple[float, Frame]] = []
    with tempfile.TemporaryDirectory(prefix="reqtable-") as folder, contextlib.ExitStack() as stack:
        path = f"{folder}/c.sock"
        orders, notes, redis = stack.enter_context(serving(path))
        stuck = stack.enter_context(client(orders, b"two lamps\n"))
        for number in range(4):
            stack.enter_context(client(notes, b"put %d\n" % (400 + number) + b"a note that is not complete " * number))
        stack.enter_context(busy(redis, 5))
        top = stack.enter_context(Terminal(path, columns=COLUMNS, lines=LINES))

        def keep(seconds: float) -> None:
            frames.append((seconds, frame_of(top.screen)))

        top.shows("^requests  10,", "Orders", "MiniRedis")
        for _ in range(3):
            shown = top.lines
            top.until(lambda shown=shown: top.lines != shown)
            keep(1.0)
        top.press("f", "state=F").shows("state=F")
        keep(1.2)
        top.press("\r").until(lambda: len(top.ids()) == 1)
        keep(1.6)
        top.press("\r").shows("^request ", "order +'two lamps'")
        keep(3.0)
        top.press("K").shows(r"\? y/n")
        keep(1.8)
        top.press("y").shows("has ended")
        keep(1.6)
        top.press("q", "f", "\x15", "\r").until(lambda: len(top.ids()) == 9)
        keep(2.0)
        assert stuck.recv(1) == b"", "the server has closed this connection, and only this one"
        assert top.press("q").ends() == 0
    return frames


@contextlib.contextmanager
def serving(path: str) -> Iterator[list[tuple[str, int]]]:
    """Run the program during the block, with that control socket. Yields the addresses of its three handlers."""
    program = Path(path).with_name("orders.py")
    program.write_text(PROGRAM)
    command = [sys.executable, "-c", f"import runpy; runpy.run_path({str(program)!r}, run_name='__main__')"]
    environment = {**os.environ, "REQTABLE_CONTROL": path}
    with Started(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            # as soon as these lines are there, so is the control socket
            found = [re.search(r" on tcp://(.*):(\d+)$", process.stderr.readline()) for _ in range(3)]
            yield [(each[1], int(each[2])) for each in found if each is not None]
        finally:
            process.kill()


@contextlib.contextmanager
def client(address: tuple[str, int], sent: bytes) -> Iterator[socket.socket]:
    with socket.create_connection(address, WAIT_S) as connection:
        connection.sendall(sent)
        yield connection


@contextlib.contextmanager
def busy(address: tuple[str, int], count: int) -> Iterator[None]:
    """Have clients of the small Redis ask without a pause during the block."""
    stop = threading.Event()

    def ask(number: int) -> None:
        with socket.create_connection(address, WAIT_S) as connection:
            while not stop.wait(0.002 * number):
                connection.sendall(b"INCR visits\r\n")
                connection.recv(100)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(1, count + 1)]
    for each in threads:
        each.start()
    try:
        yield
    finally:
        stop.set()
        for each in threads:
            each.join(WAIT_S)


def frame_of(screen: pyte.Screen) -> Frame:
    return tuple(tuple(runs_of(screen.buffer[number])) for number in range(screen.lines))


def runs_of(line: Any) -> Iterator[Run]:
    cells = [(column, line[column]) for column in range(COLUMNS)]

    def look(cell: tuple[int, Any]) -> tuple[str, bool, bool]:
        return cell[1].fg, cell[1].bold, cell[1].reverse

    for (colour, is_bold, is_reversed), group in itertools.groupby(cells, look):
        found = list(group)
        text = "".join(character.data for _, character in found)
        if text.strip() or is_reversed:
            lead = 0 if is_reversed else len(text) - len(text.lstrip())
            yield Run(found[0][0] + lead, text.strip() if not is_reversed else text, colour, is_bold, is_reversed)


# -- drawing ----------------------------------------------------------------------------------------------------------


def svg(frames: list[tuple[float, Frame]]) -> str:
    """Draw the frames. A line that several frames have is drawn once, and used by each of them."""
    total = sum(seconds for seconds, _ in frames)
    width, height = COLUMNS * CHARACTER + 2 * MARGIN, LINES * LINE + 2 * MARGIN
    names: dict[tuple[Run, ...], str] = {}
    groups, styles, begun = [], [], 0.0
    for number, (seconds, frame) in enumerate(frames):
        uses = []
        for row, runs in enumerate(frame):
            if runs:
                name = names.setdefault(runs, f"l{len(names)}")
                uses.append(f'<use href="#{name}" y="{row * LINE}"/>')
        begin, end = 100 * begun / total, 100 * (begun + seconds) / total
        begun += seconds
        first = "" if number == 0 else "0%{visibility:hidden}"
        last = "" if number == len(frames) - 1 else f"{end:.2f}%{{visibility:hidden}}"
        styles.append(f"@keyframes f{number}{{{first}{begin:.2f}%{{visibility:visible}}{last}}}")
        styles.append(f"#f{number}{{animation:f{number} {total:.1f}s step-end infinite}}")
        groups.append(f'<g id="f{number}" visibility="{"visible" if number == 0 else "hidden"}">{"".join(uses)}</g>')
    lines = "".join(f'<g id="{name}">{"".join(map(drawn, runs))}</g>' for runs, name in names.items())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" '
        f'height="{height}" role="img" aria-label="reqtable top: an operator finds a stuck request and ends it">'
        f"<style>text{{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre}}"
        f'{"".join(styles)}</style><rect width="100%" height="100%" rx="10" fill="{GROUND}"/>'
        f'<defs>{lines}</defs><g transform="translate({MARGIN} {MARGIN})">{"".join(groups)}</g></svg>\n'
    )


def drawn(run: Run) -> str:
    """Draw the run. Its length is given, so that it fits its columns in any font."""
    x, length = run.column * CHARACTER, len(run.text) * CHARACTER
    colour, ground = COLOURS.get(run.colour, COLOURS["default"]), ""
    if run.is_reversed:
        ground = f'<rect x="{x:.1f}" width="{length:.1f}" height="{LINE}" fill="{colour}"/>'
        colour = GROUND
    if not run.text.strip():
        return ground
    weight = ' font-weight="bold"' if run.is_bold else ""
    return (
        f'{ground}<text x="{x:.1f}" y="13" textLength="{length:.1f}" fill="{colour}"{weight} xml:space="preserve">'
        f"{escape(run.text)}</text>"
    )


def frames_in(text: str) -> int:
    """Return how many frames a picture has. Raises ParseError if a browser could not read it."""
    return len(re.findall(r"@keyframes", "".join(ElementTree.fromstring(text).itertext())))


if __name__ == "__main__":
    target = Path(sys.argv[1]) if sys.argv[1:] else FILE
    target.write_text(svg(recorded()))
    print(f"{target}: {target.stat().st_size:,} bytes")
