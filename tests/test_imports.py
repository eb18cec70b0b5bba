"""Finding code by its name or its file, and naming the line of an error in it."""

from __future__ import annotations

import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import reqtable
from reqtable.config.import_string import module_at, thing_at
from reqtable.table.tracebacks import account_of, is_of_program


@pytest.fixture(autouse=True)
def nothing_stays_imported() -> Iterator[None]:
    path, modules = sys.path[:], set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def written(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def error_of(place: str) -> BaseException:
    try:
        module_at(place)
    except (Exception, SystemExit) as error:
        return error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)  # without this frame
    pytest.fail("it was imported")


def test_a_file_finds_what_lies_beside_it(tmp_path: Path) -> None:
    written(tmp_path, app="import beside\nthing = beside.thing\n", beside="thing = 7\n")
    before = sys.path[:]
    assert module_at(str(tmp_path / "app.py")).thing == 7
    assert sys.path == [str(tmp_path), *before], "as python has it"
    assert thing_at(f"{tmp_path}/app.py:thing") == 7
    assert sys.path == [str(tmp_path), *before], "once"


def test_a_file_beside_it_comes_before_one_of_that_name_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    sys.path.insert(0, str(written(tmp_path / "elsewhere", beside="thing = 1\n")))
    written(tmp_path, app="import beside\n", beside="thing = 2\n")
    assert module_at(str(tmp_path / "app.py")).beside.thing == 2


@pytest.mark.parametrize(
    ("text", "said", "line"),
    [
        ("x = 1\n\nnope\n", "NameError: name 'nope' is not defined", 3),
        ("x = 1\ndef f(:\n    pass\n", "SyntaxError: invalid syntax", 2),
        ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'", 1),
        ("from json import no_such_name\n", "ImportError: cannot import name 'no_such_name' from 'json'", 1),
        ("def f():\n    return 1 / 0\nf()\n", "ZeroDivisionError: division by zero", 2),
        ("import json\n\njson.loads('{')\n", "JSONDecodeError: Expecting property name", 3),
        ("import reqtable\nreqtable.Config(dispatch=3)\n", "ConfigurationError: dispatch must be a string", 2),
        ("import sys\nsys.exit('no')\n", "SystemExit: no", 2),
        ("raise ValueError('two\\n  lines')\n", "ValueError: two lines", 1),
    ],
)
@pytest.mark.parametrize("through", [False, True], ids=["the file", "one that it imports"])
def test_an_error_of_a_file_has_its_line(text: str, said: str, line: int, through: bool, tmp_path: Path) -> None:
    written(tmp_path, app="import failing\n", failing=text)
    account = account_of(error_of(str(tmp_path / ("app.py" if through else "failing.py"))))
    assert account.startswith(said)
    assert account.endswith(f" ({tmp_path}/failing.py:{line})")
    assert "\n" not in account


def test_an_error_of_nobodys_code_has_no_line() -> None:
    assert account_of(error_of("no_such_module")) == "ModuleNotFoundError: No module named 'no_such_module'"


def test_the_line_is_the_programs_and_not_that_of_a_package_it_uses(tmp_path: Path) -> None:
    packages = tmp_path / "site-packages"
    packages.mkdir()
    sys.path.insert(0, str(written(packages, package="def make():\n    raise OSError('none')\n")))
    written(tmp_path, app="import package\n\npackage.make()\n")
    assert account_of(error_of(str(tmp_path / "app.py"))) == f"OSError: none ({tmp_path}/app.py:3)"
    written(packages, failing="import package\npackage.make()\n")
    assert account_of(error_of("failing")).endswith(f" ({packages}/package.py:2)"), "where there is no other"


@pytest.mark.parametrize(
    ("file", "is_so"),
    [
        (__file__, True),
        (json.__file__, False),
        ("<frozen importlib._bootstrap>", False),
        (reqtable.__file__, False),
        (f"{sysconfig.get_path('stdlib')}/site-packages/flask/app.py", True),
    ],
)
def test_whose_code_a_file_has(file: str, is_so: bool) -> None:
    assert is_of_program(file) is is_so


def test_our_own_code_is_not_the_programs_where_it_is_installed_among_packages(monkeypatch: Any) -> None:
    own = f"{sysconfig.get_path('stdlib')}/site-packages/reqtable/"
    monkeypatch.setattr("reqtable.table.tracebacks._OWN", own)
    assert not is_of_program(f"{own}loop/loop.py")
