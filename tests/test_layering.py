"""Imports go one way, the core is pure, and what is public is what the package says."""

from __future__ import annotations

import ast
import functools
import inspect
from pathlib import Path

import pytest

import reqtable
from tests.support import COMPILED

ROOT = Path(reqtable.__file__).parent
IMPURE = {"socket", "selectors", "time", "threading", "ssl", "os", "signal", "select"}
# Each layer may import itself and those before it.
LAYERS = ["table", "config", "loop", "net", "handlers", "dispatch", "server", "run", "testing", "compat"]
# Who may import a package that is not the standard library's.
THIRD_PARTY = {
    "greenlet": {"dispatch/green/socket.py", "dispatch/policies/greenlet.py"},
    "click": {"run/cli.py", "compat/__main__.py"},
    "pytest": {"testing/plugin.py"},
}


@functools.cache
def imports_of(path: Path) -> list[tuple[str, bool]]:
    """The modules that a file imports, and whether it does so when it is run (not only for a type checker)."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) not in for_types) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.append((node.module or "", id(node) not in for_types))
    return found


def layer_of(module: str) -> int | None:
    parts = module.split(".")
    return LAYERS.index(parts[1]) if parts[0] == "reqtable" and len(parts) > 1 and parts[1] in LAYERS else None


MODULES = sorted(path for path in ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    relative = path.relative_to(ROOT)
    own = layer_of("reqtable." + ".".join(relative.with_suffix("").parts))
    for module, at_run_time in imports_of(path):
        assert not module.startswith("reqtable.testing") or relative.parts[0] == "testing"
        if relative.parts[0] == "table":
            assert module.split(".")[0] not in IMPURE, f"{relative} imports {module}"
        if own is not None and at_run_time:
            assert module != "reqtable", f"{relative} imports the package itself"
            there = layer_of(module)
            assert there is None or there <= own, f"{relative} imports {module}, which is above it"
        for package, allowed in THIRD_PARTY.items():
            if module.split(".")[0] == package:
                assert str(relative) in allowed, f"{relative} imports {module}"


def test_there_is_no_cycle() -> None:
    graph = {
        "reqtable." + ".".join(path.relative_to(ROOT).with_suffix("").parts): [
            module for module, at_run_time in imports_of(path) if at_run_time and module.startswith("reqtable.")
        ]
        for path in MODULES
    }
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above, module))
        if module not in done:
            for imported in graph.get(module, []):
                visit(imported, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_all_is_what_is_imported() -> None:
    names = {name for name in vars(reqtable) if name[0] != "_" and not inspect.ismodule(getattr(reqtable, name))}
    assert names == set(reqtable.__all__)
    assert len(reqtable.__all__) == len(set(reqtable.__all__))


def test_the_names_of_socketserver_are_here() -> None:
    import socketserver

    missing = [name for name in socketserver.__all__ if not hasattr(reqtable, name)]
    assert missing == []


@pytest.mark.parametrize("name", reqtable.__all__)
def test_every_public_thing_is_documented(name: str) -> None:
    thing = getattr(reqtable, name)
    if inspect.isfunction(thing) or (inspect.isclass(thing) and not COMPILED):  # mypyc keeps no docstrings of classes
        assert inspect.getdoc(thing), name
