"""The source distribution, the wheel, and the C module, which is optional."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import reqtable

ROOT = Path(__file__).parent.parent
BUILD_S = 120
COMPILER = shutil.which("cc") or shutil.which("gcc")
HEADERS = Path(sysconfig.get_path("include"))
CAN_COMPILE = COMPILER is not None and (HEADERS / "Python.h").exists()
needs_a_compiler = pytest.mark.skipif(not CAN_COMPILE, reason="there is no C compiler, or no Python.h")
pytestmark = pytest.mark.timeout(2 * BUILD_S)  # on a busy machine; a build takes seconds
# What tools make in the folder of the repository.
MADE = (".git", ".venv*", ".hypothesis", ".*_cache", "__pycache__", "build", "dist", "*.egg-info", "*.so")

# A server answers one line. Prints whether the module is there.
SERVES = """
import socket, threading
import reqtable
from reqtable.handlers.lean import lean

class Echo(reqtable.StateRequestHandler):
    @reqtable.state(reqtable.line())
    def only(self, text):
        self.send(text.upper())

with reqtable.TableTCPServer(("127.0.0.1", 0), Echo) as server:
    loop = threading.Thread(target=server.serve_forever)
    loop.start()
    with socket.create_connection(server.server_address) as client:
        client.sendall(b"hello\\n")
        assert client.makefile("rb").read() == b"HELLO\\n"
    server.shutdown()
    loop.join()
print(lean and lean.__name__)
"""


def ran(*command: object, cwd: Path, **environment: str) -> str:
    """Run a command that must not fail. Returns all that the command says."""
    done = subprocess.run(
        [str(each) for each in command],
        cwd=cwd,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "REQTABLE_PURE": "", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=BUILD_S,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def members(archive: Path) -> set[str]:
    """Return the files of a source distribution or of a wheel, without the folder that holds all of them."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return set(wheel.namelist())
    with tarfile.open(archive) as sources:
        return {member.name.partition("/")[2] for member in sources if member.isfile()}


def files(root: Path, *folders: str) -> set[str]:
    """Return the files below these folders of `root`."""
    paths = (path for folder in folders for path in (root / folder).rglob("*") if path.is_file())
    return {str(path.relative_to(root)) for path in paths}


def installed(wheel: Path, folder: Path) -> Path:
    """Install a wheel in a new virtual environment, without its dependencies. Returns the environment's Python."""
    ran(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    assert ran(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=folder.parent) == ""
    return python


def metadata(wheel: Path) -> Message:
    """Return what a wheel says of itself."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_bytes(archive.read(name))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository's files, because a build writes into the folder of its sources."""
    folder = tmp_path_factory.mktemp("packaging") / "reqtable"
    return Path(shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*MADE)))


@pytest.fixture(scope="module")
def archives(sources: Path) -> tuple[Path, Path]:
    """The source distribution, and the wheel that is built from it."""
    ran(sys.executable, "-m", "build", "--no-isolation", ".", cwd=sources)
    dist = sources / "dist"
    (archive,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    return archive, wheel


@needs_a_compiler
def test_the_module_compiles_without_a_warning() -> None:
    assert COMPILER is not None
    strict = ("-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-c", "-o", os.devnull)
    assert ran(COMPILER, *strict, f"-isystem{HEADERS}", "reqtable/lean.c", cwd=ROOT) == ""


@needs_a_compiler
def test_this_installation_has_the_module() -> None:
    """A change of the C file that doesn't compile would otherwise go unseen: all tests would run without the module."""
    assert ran(sys.executable, "-c", "import reqtable._lean", cwd=ROOT) == ""


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("1", False),
        ("yes", False),
        pytest.param("0", True, marks=needs_a_compiler),
        pytest.param("", True, marks=needs_a_compiler),
    ],
)
def test_the_environment_turns_the_module_off(value: str, found: bool) -> None:
    said = ran(sys.executable, "-m", "reqtable", "--version", cwd=ROOT, REQTABLE_PURE=value)
    assert said == f"reqtable {reqtable.__version__} ({'C module' if found else 'pure Python'})\n"


@pytest.mark.slow
def test_the_archives_have_all_files(sources: Path, archives: tuple[Path, Path]) -> None:
    archive, wheel = (members(path) for path in archives)
    package = files(sources, "reqtable")
    assert {"reqtable/py.typed", "reqtable/control/page.html", "reqtable/lean.c"} <= package
    made = files(sources, "build", "dist", "reqtable.egg-info")
    assert archive >= files(sources, ".") - made
    in_wheel = {name for name in wheel if name.startswith("reqtable/") and not name.endswith(".so")}
    assert in_wheel == package - {"reqtable/lean.c"}


@pytest.mark.slow
def test_the_sources_have_what_their_tests_need(archives: tuple[Path, Path], tmp_path: Path) -> None:
    """An archive is a checkout: its tests run in it, with the package in it."""
    with tarfile.open(archives[0]) as sources:
        sources.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    tests = ("tests/test_table.py", "tests/test_layering.py", "tests/test_docs.py::test_links_lead_somewhere")
    said = ran(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests, cwd=unpacked, PYTHONPATH=str(unpacked))
    assert re.search(r"^[0-9]+ passed", said, re.MULTILINE), said


@pytest.mark.slow
def test_an_index_would_take_the_archives(archives: tuple[Path, Path]) -> None:
    said = ran(sys.executable, "-m", "twine", "--no-color", "check", "--strict", *archives, cwd=ROOT)
    assert said.count("PASSED") == 2


@pytest.mark.slow
def test_the_page_of_an_index_has_no_dead_link(archives: tuple[Path, Path]) -> None:
    """An index shows README.md without the files beside it."""
    about = metadata(archives[1])
    page = about.get_payload()
    assert isinstance(page, str)
    assert "# reqtable\n" in page
    assert "(docs/" in (ROOT / "README.md").read_text()
    assert [link for link in re.findall(r"\]\(([^)]*)\)", page) if not link.startswith("https://")] == []


@pytest.mark.slow
def test_the_extra_all_has_every_extra_for_users(archives: tuple[Path, Path]) -> None:
    about = metadata(archives[1])
    needs = [Requirement(each) for each in about.get_all("Requires-Dist", [])]
    for extra in ("cluster", "http", "metrics", "otel", "top"):
        assert [each for each in needs if each.marker and each.marker.evaluate({"extra": extra})], extra
    [refers] = [each for each in needs if each.marker and 'extra == "all"' in str(each.marker)]
    assert (refers.name, refers.extras) == ("reqtable", {"cluster", "http", "metrics", "otel", "top"})
    assert {each.name for each in needs if each.marker is None} == {"click", "greenlet", "msgspec"}


@pytest.mark.slow
def test_a_wheel_in_pure_python_is_for_every_platform(archives: tuple[Path, Path], tmp_path: Path) -> None:
    """It has the files of the other wheel but the module, and is built from the sources, too."""
    pip = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--no-cache-dir")
    ran(*pip, archives[0], cwd=tmp_path, REQTABLE_PURE="1")
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"reqtable-{reqtable.__version__}-py3-none-any.whl"
    assert members(wheel) == {name for name in members(archives[1]) if not name.endswith(".so")}
    assert ran(installed(wheel, tmp_path / "venv"), "-c", SERVES, cwd=tmp_path) == "None\n"


@pytest.mark.slow
@needs_a_compiler
def test_the_wheel_has_the_module(archives: tuple[Path, Path], tmp_path: Path) -> None:
    assert archives[1].name.endswith(f"-{sysconfig.get_platform().replace('-', '_')}.whl")
    python = installed(archives[1], tmp_path / "venv")
    assert ran(python, "-c", SERVES, cwd=tmp_path) == "reqtable._lean\n"
    assert ran(python, "-c", SERVES, cwd=tmp_path, REQTABLE_PURE="1") == "None\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({"CC": "/bin/false"}, id="the compiler fails"),
        pytest.param({"CC": "/no/such/compiler"}, id="there is no compiler"),
        pytest.param({"CC": f"{COMPILER} -nostdinc"}, id="there are no headers", marks=needs_a_compiler),
        pytest.param({"LDSHARED": "/bin/false"}, id="the linker fails", marks=needs_a_compiler),
    ],
)
def test_without_a_compiler_the_package_is_python(
    environment: dict[str, str], archives: tuple[Path, Path], tmp_path: Path
) -> None:
    """Pip says nothing of the module, and succeeds."""
    pip = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--no-cache-dir")
    said = ran(*pip, archives[0], cwd=tmp_path, **environment)
    assert "Successfully built reqtable\n" in said
    assert not re.search("error|warning|fail|_lean", said, re.IGNORECASE), said
    (wheel,) = tmp_path.glob("*.whl")
    assert not [name for name in members(wheel) if name.endswith(".so")]
    assert ran(installed(wheel, tmp_path / "venv"), "-c", SERVES, cwd=tmp_path) == "None\n"
