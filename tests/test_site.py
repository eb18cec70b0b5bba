"""The site of the documentation: it can be built, lacks no page, and its reference lacks no entry."""

from __future__ import annotations

import dataclasses
import html
import importlib
import re
import signal
from pathlib import Path

import click
import pytest

from docs.site.commands import anchor, commands_of
from docs.site.texts import texts_of
from reqtable.compat.__main__ import cli as compat_cli
from reqtable.config import Config, effective
from reqtable.control.figures import METRICS
from reqtable.run import cli as command_line
from reqtable.run.binds import OPTIONS
from reqtable.run.commands.finding import CouldNotAsk
from reqtable.run.worker import HANDLED
from reqtable.table.limits import Limits
from reqtable.table.states import Ending, Event, State
from tests.site import BUILD_S, ROOT, built_site, said

pytestmark = pytest.mark.timeout(BUILD_S + 10)  # the first test waits for the build
PUBLIC = ["reqtable", "reqtable.wants", "reqtable.testing", "reqtable.http", "reqtable.config", "reqtable.dispatch"]
OTHERS = {"reqtable.control.tracing": ["trace"], "reqtable.compat": ["environment"]}
PAGES = sorted(path.relative_to(ROOT / "docs") for path in (ROOT / "docs").glob("**/*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    return built_site(tmp_path_factory, worker_id)


def entries(page: str) -> dict[str, str]:
    """Return the text of each part of a page, by the id of the part's heading."""
    _, *parts = re.split(r'<h[1-6] [^>]*?id="([^"]+)"', page)
    return {name: re.sub(r"<[^>]+>", " ", part) for name, part in zip(parts[::2], parts[1::2], strict=True)}


def reference(site: Path, name: str) -> dict[str, str]:
    return entries((site / "reference" / f"{name}.html").read_text())


# -- the site ---------------------------------------------------------------------------------------------------------


def test_it_builds_without_a_warning(site: Path) -> None:
    """A link that leads nowhere is a warning. (`mkdocs build --quiet` hides them, and then exits with 0.)"""
    code, _, log = said(site).partition("\n")
    assert code == "0", log


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_page_is_in_the_navigation(site: Path, page: Path) -> None:
    [navigation] = re.findall(r'<nav class="md-nav md-nav--primary.*?</nav>\s*</div>', whole(site), re.DOTALL)
    assert f'href="{page.with_suffix(".html").as_posix()}"' in navigation or page.name == "index.md"


def whole(site: Path) -> str:
    return (site / "index.html").read_text()


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = list(site.glob("**/*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        loaded = re.findall(
            r"<(?:script|img|source|iframe|link)\b[^>]*?(?:src|href|srcset)=\"?([^\" >]+)", page.read_text()
        )
        assert [each for each in loaded if "//" in each] == [], page
    for sheet in site.glob("**/*.css"):
        assert re.findall(r"url\([\"']?(?:https?:)?//", sheet.read_text()) == [], sheet


# -- the reference ----------------------------------------------------------------------------------------------------


def public_objects() -> dict[int, set[str]]:
    """Return the names of each public object: some can be imported from two modules."""
    found: dict[int, set[str]] = {}
    for module in [*PUBLIC, "reqtable.control.tracing", "reqtable.compat"]:
        public = importlib.import_module(module)
        for name in getattr(public, "__all__", OTHERS.get(module)):
            thing = getattr(public, name)
            own = f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', '')}"
            found.setdefault(id(thing), {own}).add(f"{module}.{name}")
    return found


def test_every_public_name_has_an_entry_with_a_text(site: Path) -> None:
    parts: dict[str, str] = {}
    for page in (site / "reference").glob("*.html"):
        assert "doc-symbol-module" not in page.read_text(), "a function and its module have the same name"
        _, *found = re.split(r'<h[34] id="(reqtable\.[^"]+)" class="doc doc-heading"', page.read_text())
        parts |= zip(found[::2], found[1::2], strict=True)
    missing = [names for names in public_objects().values() if not names & parts.keys()]
    assert missing == []
    without = [
        names for names in public_objects().values() if not any("<p>" in parts[each] for each in names & parts.keys())
    ]
    assert without == []


def signatures(site: Path, name: str) -> str:
    """Return all signatures of a page of the reference as text."""
    found = re.findall(r'<div class="[^"]*doc-signature.*?</div>', (site / "reference" / name).read_text(), re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", "", "\n".join(found)))


def test_a_default_is_shown_by_its_value(site: Path) -> None:
    assert "line(limit: int = 65536)" in signatures(site, "wants.html")
    assert "want: Want[Any] = nothing()," in signatures(site, "handlers.html")
    names = {
        (page.name, name)
        for page in (site / "reference").glob("*.html")
        for name in re.findall(r"= (_\w+|[A-Z_]{3,}\b)", signatures(site, page.name))
    }
    assert names == {("testing.html", "AF_INET"), ("testing.html", "SOCK_STREAM")}, "the reader needs the value"


def test_a_method_and_a_property_are_shown_as_such(site: Path) -> None:
    assert "send(data: bytes | bytearray | memoryview) -> None" in signatures(site, "handlers.html")
    assert "engine: Engine" in signatures(site, "servers.html")
    assert "engine()" not in signatures(site, "servers.html")


def test_every_configuration_key_has_an_entry_with_a_text(site: Path) -> None:
    shown = reference(site, "configuration")
    keys = [key for key, _, _ in effective(Config())]
    keys += ["executor.arguments", "executors.NAME.factory", "tls.names.NAME.cert", "tls.names.NAME.key"]
    assert len(keys) > len(dataclasses.fields(Limits)) + 20
    for key in keys:
        _, facts, text, *_ = [line for line in shown[key].splitlines() if line.strip()]
        assert re.search(r"SIGHUP|at the start only", facts), f"{key} has no line on when it changes"
        assert len(text) > 20, f"{key} has no text"


COMMANDS = [*commands_of(command_line.cli, "reqtable"), *commands_of(compat_cli, "python -m reqtable.compat")]


@pytest.mark.parametrize(("name", "command"), COMMANDS, ids=[anchor(name) for name, _ in COMMANDS])
def test_every_command_and_option_has_an_entry_with_a_text(site: Path, name: str, command: click.Command) -> None:
    part = " ".join(html.unescape(reference(site, "commands")[anchor(name)]).split())
    assert command.help
    assert " ".join(command.help.replace("`", " ").split()[:3]) in part
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, f"{name} {option.opts[0]} has no text"
            assert all(each in part for each in option.opts), option.name
            assert option.help.split()[0] in part


def test_every_metric_has_an_entry_with_a_text(site: Path) -> None:
    shown = reference(site, "metrics")
    for metric in METRICS.values():
        assert metric.text in html.unescape(shown[metric.name])
        assert all(label in shown[metric.name] for label in metric.labels)


@pytest.mark.parametrize("kind", [State, Event, Ending])
def test_every_state_event_and_ending_has_an_entry_with_a_text(site: Path, kind: type[State | Event | Ending]) -> None:
    page = html.unescape((site / "reference" / "states.html").read_text())
    for each in kind:
        name = each.name if kind is State else each.value
        assert f"<code>{name}</code></td>\n<td>{texts_of(kind)[each.name]}</td>" in page


def test_every_signal_bind_variable_and_exit_code_has_an_entry(site: Path) -> None:
    page = (site / "reference" / "running.html").read_text()

    def first_cells(chapter: str) -> set[str]:
        part = re.split(r"<h2", page.partition(f'id="{chapter}"')[2])[0]
        return {re.sub("<[^>]+>", "", cell) for cell in re.findall(r"<tr>\s*<td>(.*?)</td>", part, re.DOTALL)}

    assert first_cells("signals") == {signal.Signals(number).name for number in HANDLED}
    options = {name for names in OPTIONS.values() for name in names}
    assert first_cells("binds") == {f"{scheme}://" for scheme in OPTIONS} | options
    codes = {0, command_line.FAILURE, command_line.USAGE, CouldNotAsk.exit_code, command_line.CONFIGURATION}
    assert first_cells("exit-codes") == {str(code) for code in codes}
    source = "\n".join(path.read_text() for path in (ROOT / "reqtable").glob("**/*.py"))
    assert [name for name in set(re.findall(r"\bREQTABLE_[A-Z]+\b", source)) if name not in page] == []


def test_every_state_machine_of_the_examples_is_drawn(site: Path) -> None:
    shown = reference(site, "machines")
    sources = "\n".join(path.read_text() for path in (ROOT / "examples").glob("*.py"))
    declared = re.findall(r"^class (\w+)\((?:\w+\.)?StateRequestHandler\)", sources, re.MULTILINE)
    assert len(declared) > 5
    assert [name for name in declared if name not in shown] == []
