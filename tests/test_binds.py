"""Where a server listens: the syntax of binds, the checks before binding, and the sockets and files afterwards."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import reqtable
from reqtable import ConfigurationError
from reqtable.run.binds import parse_bind
from reqtable.run.endpoints import find_endpoints
from reqtable.run.listening import make_server, name_of, open_server
from tests.support import WAIT_S, Client, serving
from tests.test_cli import COMMAND, ROOT, port_of, run

ECHO = "examples/echo.py:StateEcho"
NOBODY = 65534


class Echo(reqtable.AsyncRequestHandler):
    async def handle(self) -> None:
        while text := await self.read(reqtable.line()):
            await self.send(text)


@contextlib.contextmanager
def opened(*binds: str) -> Iterator[list[Any]]:
    """Open the servers of these binds on one engine."""
    servers: list[Any] = []
    with contextlib.ExitStack() as stack:
        for place in find_endpoints(binds):
            servers.append(make_server(place, Echo, None, reqtable.Config()))
            stack.callback(servers[-1].server_close)
        for server in servers:
            stack.callback(open_server(server))
        yield servers


def udp_answer(address: Any, family: int) -> bytes:
    with socket.socket(family, socket.SOCK_DGRAM) as peer:
        peer.settimeout(WAIT_S)
        peer.sendto(b"datagram\n", address)
        return peer.recv(100)


# -- what one says ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "scheme", "address", "options"),
    [
        ("tcp://127.0.0.1:7000", "tcp", ("127.0.0.1", 7000), {}),
        ("tcp://[::]:7000?v6only=1", "tcp", ("::", 7000), {"v6only": "1"}),
        ("udp://:69", "udp", ("", 69), {}),
        ("unix:///run/a#b+c?mode=660&group=a%2Db+c", "unix", "/run/a#b+c", {"mode": "660", "group": "a-b+c"}),
        ("unix://relative.sock", "unix", "relative.sock", {}),
        ("unixgram://@name", "unixgram", "\0name", {}),
        ("fd://3", "fd", 3, {}),
        ("fd://http", "fd", "http", {}),
    ],
)  # fmt: skip
def test_what_a_bind_says(text: str, scheme: str, address: Any, options: dict[str, str]) -> None:
    bind = parse_bind(text)
    assert (bind.text, bind.scheme, bind.address, bind.options) == (text, scheme, address, options)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("localhost", "tcp://…, tls://…, udp://…, unix://…, unixgram://…, fd://…"),
        ("localhost", "such as tcp://127.0.0.1:7000"),
        ("127.0.0.1:8000", "such as tcp://127.0.0.1:8000"),
        ("http://localhost:80/", "such as tcp://localhost:80"),
        ("[::1]:80", "such as tcp://[::1]:80"),
        ("::1:80", "such as tcp://127.0.0.1:7000"),
        (":8000", "such as tcp://:8000"),
        ("8000", "such as tcp://127.0.0.1:8000"),
        ("/run/app.sock", "such as unix:///run/app.sock"),
        ("tcp://[::1", "a host and a port"),
        ("tcp://localhost", "a host and a port"),
        ("tcp://localhost:99999", "99999 is above 65535, the highest port: choose another one"),
        ("udp://[::1]:65536", "65536 is above 65535, the highest port: choose another one"),
        ("tcp://user@localhost:80", "a host and a port"),
        ("udp://127.0.0.1:80#x", "a host and a port"),
        ("unix://", "give a path"),
        ("unix://@", "give a path"),
        ("fd://", "a descriptor's number"),
        ("tcp://127.0.0.1:0?v6=1", "there is no option 'v6'; there are v6only, cert, key, client_ca, proxy"),
        ("unix:///tmp/x?mod=660", "there is no option 'mod'; there are mode, owner, group, cert, key, "),
        ("fd://3?mode=660", "there is no option 'mode'; there are cert, key, client_ca, proxy"),
        ("unixgram:///tmp/x?cert=x", "there is no option 'cert'; there are mode, owner, group"),
        ("tcp://127.0.0.1:0?v6only=1", "v6only is 0 or 1"),
        ("tcp://[::1]:0?v6only=yes", "v6only is 0 or 1"),
        ("tcp://no.such.invalid:80", "a name that is known here"),
        ("tcp://" + "x" * 70 + ":80", "a name that is known here"),
        ("unix:///nosuch/dir/x", "there is no directory /nosuch/dir"),
        ("unix:///tmp/x?mode=99", "mode '99': give three octal digits"),
        ("unix:///tmp/x?owner=no-such-user", "owner: there is no 'no-such-user' here"),
        ("unix:///tmp/x?group=no-such-group", "group: there is no 'no-such-group' here"),
        ("unix://@name?mode=660", "an abstract socket has no file"),
        ("unix:///tmp/" + "x" * 103, "has at most 107 bytes"),
        ("fd://999", "bad file descriptor"),
        ("fd://name", "no socket of that name; names that it passed: none"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_refused_with_its_name_and_the_mend(text: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(f"bind {text!r}: ")) as refused:
        find_endpoints([text])
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("bind", [("127.0.0.1", 1), None, b"tcp://127.0.0.1:0", Path("/tmp/x"), 7000, ["unix://@x"]])
def test_what_is_no_string_is_no_bind(bind: Any) -> None:
    message = f'bind {bind!r}: a bind is a string, such as "tcp://127.0.0.1:7000"'
    with pytest.raises(ConfigurationError, match=f"^{re.escape(message)}$"):
        reqtable.serve(Echo, "tcp://127.0.0.1:0", bind)


def test_the_same_bind_twice_is_refused() -> None:
    for binds in (
        ["tcp://127.0.0.1:7000", "tcp://127.0.0.1:7000/"],
        ["tcp://localhost:7000", "tcp://localhost:7000"],
        ["unix:///tmp/x", "unix:///tmp/x?mode=600"],
        ["unix://@x", "unix://@x"],
    ):
        with pytest.raises(ConfigurationError, match=f"it is given twice, first as '{binds[0]}'"):
            find_endpoints(binds)
    find_endpoints(
        ["tcp://127.0.0.1:7000", "udp://127.0.0.1:7000", "tcp://127.0.0.1:7001", "unix://@x", "unixgram://@x"]
    )
    find_endpoints(["tcp://127.0.0.1:0", "tcp://127.0.0.1:0"])


def test_what_is_no_bound_socket_is_refused() -> None:
    read_end, write_end = os.pipe()
    one, other = socket.socketpair()
    with one, other:
        for number, words in [(read_end, "socket operation on non-socket"), (one.fileno(), "a connection")]:
            with pytest.raises(ConfigurationError, match=words):
                find_endpoints([f"fd://{number}"])
    os.close(read_end)
    os.close(write_end)


# -- what is there then -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("v6only", [0, 1])
def test_an_address_of_ipv6_is_for_both_unless_it_says_otherwise(v6only: int) -> None:
    with opened(f"tcp://[::]:0?v6only={v6only}", f"udp://[::]:0?v6only={v6only}") as (stream, datagrams):
        for server in (stream, datagrams):
            assert server.socket.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == v6only
        with serving(stream):
            port = stream.server_address[1]
            with Client(("::1", port), socket.AF_INET6) as six:
                assert six.ask(b"a\n") == b"a\n"
            if v6only:
                with socket.socket() as four:
                    assert four.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED
            else:
                with Client(("127.0.0.1", port)) as four:
                    assert four.ask(b"a\n") == b"a\n"
        with serving(datagrams):
            port = datagrams.server_address[1]
            assert udp_answer(("::1", port), socket.AF_INET6) == b"datagram\n"
            if not v6only:
                assert udp_answer(("127.0.0.1", port), socket.AF_INET) == b"datagram\n"


@pytest.mark.parametrize("scheme", ["tcp", "udp"])
def test_a_bind_without_a_host_says_how_far_it_reaches(scheme: str, caplog: pytest.LogCaptureFixture) -> None:
    with opened(f"{scheme}://0.0.0.0:0", f"{scheme}://127.0.0.1:0", f"unix://@reqtable-{os.getpid()}"):
        assert not caplog.records
    with opened(f"{scheme}://:0") as [server]:
        assert server.server_address[0] == "0.0.0.0"
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        f"bind '{scheme}://:0': no host is given, so it listens on every IPv4 address of this machine: write "
        f"{scheme}://127.0.0.1:0 for programs on this machine only, {scheme}://0.0.0.0:0 for every IPv4 address, "
        f"{scheme}://[::]:0 for IPv6, too"
    )


def test_both_families_side_by_side() -> None:
    with opened("tcp://127.0.0.1:0") as [four]:
        port = four.server_address[1]
        with opened(f"tcp://[::]:{port}?v6only=1") as [six]:
            assert six.server_address[1] == port


def test_a_name_is_looked_up() -> None:
    with opened("tcp://localhost:0") as [server]:
        assert server.server_address[0] in ("127.0.0.1", "::1")


def test_an_abstract_socket() -> None:
    name = f"reqtable-{os.getpid()}"
    with opened(f"unix://@{name}", f"unixgram://@{name}-d") as (server, datagrams):
        assert (name_of(server), name_of(datagrams)) == (f"unix://@{name}", f"unixgram://@{name}-d")
        with serving(server), Client("\0" + name, socket.AF_UNIX) as client:
            assert client.ask(b"a\n") == b"a\n"


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("scheme", ["unix", "unixgram"])
@pytest.mark.parametrize(("mode", "mask"), [("660", 0), ("660", 0o077), ("600", 0), ("666", 0o022), ("0777", 0o777)])
def test_a_files_permissions_are_never_more_than_asked(
    scheme: str, mode: str, mask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looks at the permissions just before they are set: by then bind(2) has made the file."""
    path = tmp_path / "x.sock"
    seen: list[int] = []
    chmod = os.chmod

    def look_first(*arguments: Any, **options: Any) -> None:
        seen.append(stat.S_IMODE(path.stat().st_mode))
        chmod(*arguments, **options)

    monkeypatch.setattr(os, "chmod", look_first)
    with umask(mask), opened(f"{scheme}://{path}?mode={mode}"):
        monkeypatch.undo()
        assert stat.S_IMODE(path.stat().st_mode) == int(mode, 8)
    assert seen == [int(mode, 8) & 0o700 & ~mask]
    assert not path.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
def test_a_files_owner_and_group(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    with opened(f"unix://{path}?mode=660&owner={NOBODY}&group={NOBODY}"):
        found = path.stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (NOBODY, NOBODY, 0o660)
    with opened(f"unix://{path}?owner=root"):
        assert path.stat().st_uid == 0


def test_a_file_whose_permissions_can_not_be_set_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refuse)
    with (
        pytest.raises(ConfigurationError, match="an address that this user may use"),
        opened(f"unix://{tmp_path}/x?mode=600"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_one_in_use_takes_back_what_was_bound_before_it(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        bind = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(OSError, match="address already in use by this process itself: choose another one"):
            reqtable.serve(Echo, f"unix://{tmp_path}/x.sock", bind)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_bound_where_one_can_not_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="bad file descriptor"):
        reqtable.serve(Echo, f"unix://{tmp_path}/x.sock", "fd://999", on_listening=lambda _: pytest.fail("bound"))
    with pytest.raises(ConfigurationError, match="only a StateRequestHandler"):
        reqtable.serve(Echo, f"unix://{tmp_path}/x.sock", dispatch="executor")
    assert list(tmp_path.iterdir()) == []


# -- exit codes -------------------------------------------------------------------------------------------------------


def run_as_nobody(*arguments: str, first: str = "") -> subprocess.CompletedProcess[str]:
    """Run `reqtable serve` as an unprivileged user.

    It imports its modules before it gives up root, because only root may be able to read their folder.
    """
    code = f"import os, sys; sys.path[:] = {sys.path!r}\n"
    code += "import encodings.idna, grp, pwd, reqtable.run.cli, examples.echo\n"
    code += first + "\n"
    if os.geteuid() == 0:
        code += f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
    code += "os.chdir('/'); reqtable.run.cli.main(sys.argv[1:])\n"
    command = [sys.executable, "-c", code, "serve", "examples.echo:StateEcho", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S, check=False)


def first_unprivileged_port() -> int:
    return int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())


@pytest.mark.skipif(first_unprivileged_port() < 2, reason="on this machine any user may take any port")
@pytest.mark.parametrize(
    "first", ["", "reqtable.run.endpoints._may = lambda right: True"], ids=["checked", "refused by bind(2)"]
)
def test_a_low_port_without_the_right(first: str, tmp_path: Path) -> None:
    bind = f"tcp://127.0.0.1:{first_unprivileged_port() - 1}"
    result = run_as_nobody("--bind", bind, first=first)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (78, "", 1), result.stderr
    assert result.stderr.startswith(f"reqtable: bind '{bind}': ")
    assert ("CAP_NET_BIND_SERVICE" in result.stderr) == (not first)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has a folder that another user may not write to")
@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("", "this user may not write to"),
        ("?owner=root", "may not give its file to root"),
        ("?group=root", "not in group root"),
    ],
)
def test_a_place_without_the_right(option: str, words: str) -> None:
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="reqtable-binds-"))
    folder.chmod(0o755 if not option else 0o777)
    try:
        result = run_as_nobody("--bind", f"unix://{folder}/x.sock{option}")
        assert (result.returncode, result.stderr.count("\n")) == (78, 1), result.stderr
        assert words in result.stderr
        assert list(folder.iterdir()) == []
    finally:
        folder.rmdir()


@pytest.mark.parametrize("bind", ["localhost", "fd://99", "unix:///nosuch/dir/x", "tcp://nosuch.invalid:0"])
def test_a_bind_that_can_not_be_is_exit_code_78(bind: str, tmp_path: Path) -> None:
    result = run("serve", ECHO, "--bind", f"unix://{tmp_path}/x.sock", "--bind", bind)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (78, "", 1), result.stderr
    assert result.stderr.startswith(f"reqtable: bind '{bind}': ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[limits]\nentries_max = 0\n", "2: entries_max must be a whole number above 0, not 0"),
        ("[limits]\nwhen_full = 'never'\n", "2: when_full must be one of wait, reject, evict, not 'never'"),
        ("workers = 0\n", "1: workers must be a whole number above 0, not 0"),
        ("workers = 'two'\n", "1: workers must be a whole number above 0, not 'two' (or leave it out)"),
    ],
)
def test_a_bad_configuration_is_exit_code_78_before_anything_is_bound(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "reqtable.toml"
    path.write_text(text)
    result = run("serve", ECHO, "--bind", f"unix://{tmp_path}/x.sock", "--config", str(path))
    assert (result.returncode, result.stdout, result.stderr) == (78, "", f"reqtable: {path}:{message}\n")
    assert list(tmp_path.iterdir()) == [path]


# -- sockets that systemd passes --------------------------------------------------------------------------------------

# As systemd does it: the descriptors from 3 on, the process's own number, then exec.
ACTIVATE = """
import fcntl, os, sys
numbers, names, pid, command = eval(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]
high = [fcntl.fcntl(number, fcntl.F_DUPFD, 100) for number in numbers]
for place, number in enumerate(high, 3):
    os.dup2(number, place, inheritable=True)
os.environ.update(LISTEN_FDS=str(len(numbers)), LISTEN_FDNAMES=names, LISTEN_PID=pid or str(os.getpid()))
os.execv(command[0], command)
"""


@contextlib.contextmanager
def activated(
    *arguments: str, names: str = "", pid: str = "", listeners: int = 1
) -> Iterator[tuple[list[Any], list[str]]]:
    """Run `reqtable serve` with two sockets from systemd. Yields the sockets and the lines that it printed."""
    with socket.socket() as one, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as two:
        for own in (one, two):
            own.bind(("127.0.0.1", 0))
        one.listen()
        numbers = [one.fileno(), two.fileno()]
        command = [*COMMAND, "serve", "tests/teller.py:Teller", *arguments]
        process = subprocess.Popen(
            [sys.executable, "-c", ACTIVATE, repr(numbers), names, pid, *command],
            cwd=ROOT, pass_fds=numbers, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            yield [one, two], [process.stdout.readline().strip() for _ in range(listeners)]
        finally:
            process.terminate()
            process.communicate(timeout=WAIT_S)


def ask(address: Any, question: bytes) -> bytes:
    with Client(address) as client:
        return client.ask(question)


@pytest.mark.parametrize("arguments", [[], ["--workers", "2"]], ids=["alone", "workers"])
def test_without_a_bind_all_that_systemd_passed_are_served(arguments: list[str]) -> None:
    with activated(*arguments, listeners=2) as (sockets, lines):
        one, two = (own.getsockname() for own in sockets)
        assert lines == [f"serving Teller on tcp://127.0.0.1:{one[1]}", f"serving Teller on udp://127.0.0.1:{two[1]}"]
        assert [ask(one, b"env %s\n" % name) for name in (b"LISTEN_PID", b"LISTEN_FDS", b"LISTEN_FDNAMES")] == [
            b"-\n"
        ] * 3
        assert [ask(one, b"inheritable %d\n" % number) for number in (3, 4)] == [b"False\n"] * 2


def test_one_is_chosen_by_its_name_or_number() -> None:
    for bind in ("fd://web", "fd://3"):
        with activated("--bind", bind, names="web:datagrams") as (sockets, [line]):
            assert line == f"serving Teller on tcp://127.0.0.1:{sockets[0].getsockname()[1]}"


def test_all_of_one_name_are_served() -> None:
    with activated("--bind", "fd://all", names="all:all", listeners=2) as (_, lines):
        assert [re.sub(r"\d+$", "", line) for line in lines] == [
            "serving Teller on tcp://127.0.0.1:",
            "serving Teller on udp://127.0.0.1:",
        ]


def test_what_was_passed_to_another_process_is_ignored() -> None:
    with activated("--bind", "tcp://127.0.0.1:0", pid="1") as (sockets, [line]):
        assert port_of(line) != sockets[0].getsockname()[1]
        assert ask(("127.0.0.1", port_of(line)), b"env LISTEN_PID\n") == b"1\n"


def test_a_count_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", "many")
    with pytest.raises(ConfigurationError, match="environment LISTEN_FDS: 'many'"):
        find_endpoints([])
