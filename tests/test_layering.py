"""Imports go one way, the core does no I/O, and `__all__` lists the public names."""

from __future__ import annotations

import ast
import functools
import inspect
from pathlib import Path

import pytest

import reqtable

ROOT = Path(reqtable.__file__).parent
IMPURE = {"socket", "selectors", "time", "threading", "ssl", "os", "signal", "select"}
# The layers, the lowest first: each may import itself and those below it, also in imports for type checkers.
LAYERS = [
    "table",
    "config",
    "loop",
    "net",
    "handlers",
    "dispatch",
    "server",
    "handover",
    "http",
    "control",
    "run",
    "testing",
    "compat",
]
# The files that may import a package from outside the standard library.
THIRD_PARTY = {
    "greenlet": {
        "dispatch/green/handler.py",
        "dispatch/green/socket.py",
        "dispatch/green/transport.py",
        "dispatch/policies/greenlet.py",
        "http/wsgi_green.py",
    },
    "click": {
        "run/cli.py",
        *(f"run/commands/{path.name}" for path in (ROOT / "run" / "commands").glob("*.py") if path.stem != "__init__"),
        "compat/__main__.py",
    },
    "pytest": {"testing/plugin.py"},
    "python_multipart": {"http/forms.py"},
    "prometheus_client": {"control/exposition.py"},
    "opentelemetry": {"control/tracing.py"},
    "rich": {"run/top/view.py", "run/top/screen.py"},
}


MODULES = sorted(path for path in ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path) for path in MODULES}


@functools.cache
def imports_of(path: Path) -> list[str]:
    """Return the modules that a file imports, including imports for type checkers only."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found += [found_module(node.module or "", alias.name) for alias in node.names]
    return found


def found_module(package: str, name: str) -> str:
    """Return the module that `from package import name` imports: `name` itself may be a module."""
    inside = f"{package}.{name}"
    return inside if inside in NAMES else package


def layer_of(module: str) -> int | None:
    parts = module.split(".")
    return LAYERS.index(parts[1]) if parts[0] == "reqtable" and len(parts) > 1 and parts[1] in LAYERS else None


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    relative = path.relative_to(ROOT)
    own = layer_of("reqtable." + ".".join(relative.with_suffix("").parts))
    for module in imports_of(path):
        assert not module.startswith("reqtable.testing") or relative.parts[0] == "testing"
        if relative.parts[0] == "table":
            assert module.split(".")[0] not in IMPURE, f"{relative} imports {module}"
        if own is not None:
            assert module != "reqtable", f"{relative} imports the package itself"
            there = layer_of(module)
            assert there is None or there <= own, f"{relative} imports {module}, which is above it"
        for package, allowed in THIRD_PARTY.items():
            if module.split(".")[0] == package:
                assert str(relative) in allowed, f"{relative} imports {module}"


def test_there_is_no_circle() -> None:
    graph = {name_of(path): [each for each in imports_of(path) if each in NAMES] for path in MODULES}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above[above.index(module) :], module))
        if module not in done:
            for imported in graph.get(module, []):
                visit(imported, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_no_room_is_too_big() -> None:
    """A file has at most 400 lines. A class has at most 25 methods, or its docstring says why it has more."""
    for path in MODULES:
        text = path.read_text()
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                methods = sum(isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef) for each in node.body)
                assert methods <= 25 or "methods" in (ast.get_docstring(node) or ""), f"{path}: {node.name}: {methods}"


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
    if inspect.isclass(thing) or inspect.isfunction(thing):
        assert inspect.getdoc(thing), name
