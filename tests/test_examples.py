"""Every example works with real clients: redis-benchmark, the redis package, curl, nc and socat.

The examples that connect to other services have test files of their own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import redis

from examples.chat import Chat
from examples.echo import AsyncEcho, BlockingEcho, StateEcho
from examples.files import Files
from examples.miniredis import MiniRedis, Store
from examples.netstrings import Netstring, Reverse
from examples.notes import Notes
from examples.tftp import Tftp
from examples.timeserver import Time
from reqtable import PeerError, UDPServer, UnixDatagramServer, UnixStreamServer
from reqtable.testing import FakeClock, exercise
from tests.support import WAIT_S, Client, Started, served, serving, slow_but, wait_until
from tests.test_datagram import Stepwise, peer_of
from tests.test_loop import World

EXAMPLES = Path(__file__).parent.parent / "examples"


def program(name: str) -> str:
    """Return the path of a client program, or skip the test if it is not installed. CI installs all of them."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"the client program {name} is not installed")
    return path


def run(*command: str, given: bytes = b"") -> bytes:
    return subprocess.run(command, input=given, capture_output=True, timeout=WAIT_S, check=True).stdout


def test_every_example_is_tested() -> None:
    source = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for path in EXAMPLES.glob("[a-z]*.py"):
        assert f"from examples.{path.stem} import" in source, path


# -- netstrings: a want of a program's own ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"5:hello,", b"5:olleh,"),
        (b"0:,3:a:,,", b"0:,3:,:a,"),
        (b"12:hello, world,2:no,", b"12:dlrow ,olleh,2:on,"),
        (b"1001:", b""),
        (b"1:ab", b""),
        (b"x", b""),
        (b"1234567890:", b""),
    ],
)
@pytest.mark.parametrize("at_once", [True, False], ids=["whole", "byte by byte"])
def test_netstrings(sent: bytes, answer: bytes, at_once: bool) -> None:
    request = exercise(Reverse)
    parts = [sent] if at_once else [sent[i : i + 1] for i in range(len(sent))]
    with nullcontext() if answer else pytest.raises(PeerError, match=r"netstring"):
        for part in parts:
            request.send(part)
    assert request.output == answer
    assert request.is_over == (not answer)


def test_a_netstring_of_a_datagram() -> None:
    exercise(Reverse, datagrams=True).send(b"2:ab,1:c,").expect(b"2:ba,").expect(b"1:c,")


def test_what_extends_reqtable_imports_one_module_for_it() -> None:
    for name, module in (("netstrings", "reqtable.wants"), ("stopwatch", "reqtable.dispatch")):
        source = (EXAMPLES / f"{name}.py").read_text()
        assert set(re.findall(r"^from (reqtable[\w.]*) import", source, re.MULTILINE)) <= {"reqtable", module}
    assert repr(Netstring(5)) == "netstring(limit=5)"


# -- echo, notes, chat -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("handler", "dispatch"),
    [
        (StateEcho, "inline"),
        (AsyncEcho, "inline"),
        (BlockingEcho, "inline"),
        (BlockingEcho, "greenlet"),
        (StateEcho, "greenlet"),
    ],
)
def test_echo_in_every_style(handler: Any, dispatch: str) -> None:
    text = b"one\ntwo\n" + b"x" * 1000 + b"\nno end of line"
    with served(handler, dispatch) as server:
        assert run(program("nc"), "-N", "127.0.0.1", str(server.server_address[1]), given=text) == text


def test_echo_over_a_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "echo.sock")
    with serving(UnixStreamServer(path, AsyncEcho)):
        assert run(program("socat"), "-t", "5", "-", f"unix-connect:{path}", given=b"over unix\n") == b"over unix\n"


def test_notes_with_nc() -> None:
    with served(Notes) as server:
        port = str(server.server_address[1])
        given = b"put 11\none two twocount\nput 5\nthreecount\nrank\n"
        assert run(program("nc"), "-N", "127.0.0.1", port, given=given) == b"3\n4\nrank 16\n"


def test_chat_entries_write_to_each_other() -> None:
    with served(Chat) as server, Client(server.server_address) as ann, Client(server.server_address) as bob:
        assert ann.receive(11) == b"your name? "
        ann.send(b"ann\n")
        assert ann.ask(b"/who\n") == b"ann\n"
        assert bob.receive(11) == b"your name? "
        assert bob.send(b"ann\n").receive(31) == b"that name is taken. your name? "
        bob.send(b"bob\n")
        assert ann.line() == b"* bob has joined\n"
        ann.send(b"hello\n\n")
        assert bob.line() == b"ann: hello\n"
        assert bob.ask(b"/who\n") == b"ann, bob\n"
        bob.send(b"bye\n/quit\n")
        assert ann.line() == b"bob: bye\n"
        assert bob.rest() == b""
        assert ann.line() == b"* bob has left\n"
        ann.reset()
        wait_until(server, lambda: len(server.table) <= 1)


# -- miniredis -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_store(monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store()
    monkeypatch.setattr(MiniRedis, "store", store)
    return store


@pytest.mark.parametrize(
    ("pipeline", "count"),
    [
        pytest.param(1, 100_000, marks=[pytest.mark.slow, pytest.mark.longest]),
        *slow_but([(1, 2000), (16, 2000), (16, 100_000)], (1, 2000), (16, 2000)),
    ],
)
@pytest.mark.usefixtures("fresh_store", "unchecked")
def test_redis_benchmark(pipeline: int, count: int) -> None:
    tests = "ping,set,get,incr,lpush,mset"
    with served(MiniRedis) as server:
        command = [program("redis-benchmark"), "-p", str(server.server_address[1]), "-t", tests, "-c", "50"]
        result = subprocess.run(
            [*command, "-n", str(count), "-P", str(pipeline), "--csv"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        print(result.stdout)
        wait_until(server, lambda: len(server.table) == 0)
    names = [line.split(",")[0].strip('"') for line in result.stdout.splitlines()]
    assert names == ["test", "PING_INLINE", "PING_MBULK", "SET", "GET", "INCR", "LPUSH", "MSET (10 keys)"]
    assert result.stderr == ""


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "thread", "pool"])
@pytest.mark.parametrize("count", slow_but([1200, 4800], 1200))
@pytest.mark.usefixtures("unchecked")
def test_redis_benchmark_under_other_policies(
    dispatch: str, count: int, fresh_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy is set only in the environment."""
    monkeypatch.setenv("REQTABLE_DISPATCH", dispatch)
    with served(MiniRedis) as server:
        assert server._policies.chosen.name == dispatch
        command = [program("redis-benchmark"), "-p", str(server.server_address[1]), "-t", "ping,set,get,incr,lpush"]
        result = subprocess.run(
            [*command, "-c", "20", "-n", str(count), "-P", "16", "--csv"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        print(result.stdout)
        wait_until(server, lambda: len(server.table) == 0)
    assert len(result.stdout.splitlines()) == 7
    assert result.stderr == ""
    assert fresh_store.values[b"counter:__rand_int__"] == b"%d" % count, "no increment was lost"
    assert len(fresh_store.values[b"mylist"]) == count


@pytest.fixture
def client(fresh_store: Store) -> Any:
    with served(MiniRedis) as server:
        with redis.Redis("127.0.0.1", server.server_address[1], protocol=2, socket_timeout=WAIT_S) as made:
            yield made
            made.connection_pool.disconnect()


def test_the_redis_package_works_against_it(client: Any) -> None:
    assert client.ping()
    assert client.echo("hello") == b"hello"
    assert client.set("key", b"binary\r\n\0\xff")
    assert client.get("key") == b"binary\r\n\0\xff"
    assert client.set("key", "new", nx=True) is None
    assert client.set("other", "x", xx=True) is None
    assert client.get("nothing") is None
    assert client.mset({"a": 1, "b": 2})
    assert client.mget("a", "nothing", "b") == [b"1", None, b"2"]
    assert (client.incr("a"), client.incr("count")) == (2, 1)
    assert client.exists("a", "b", "nothing") == 2
    assert (client.delete("a", "b", "nothing"), client.exists("a")) == (2, 0)
    assert client.lpush("list", 1, 2, 3) == 3
    assert client.lrange("list", 0, -1) == [b"3", b"2", b"1"]
    assert client.lrange("list", -2, 5) == [b"2", b"1"]
    assert client.lrange("nothing", 0, -1) == []
    assert client.config_get("save") == {"save": ""}
    assert client.command() == {}
    assert client.info("server")["redis_version"] == "reqtable"


def test_its_errors_are_redis_errors(client: Any) -> None:
    client.set("word", "x")
    client.lpush("list", 1)
    for message, command in [
        ("unknown command 'NOSUCH'", ("NOSUCH",)),
        ("wrong number of arguments for 'get' command", ("GET",)),
        ("not an integer", ("INCR", "word")),
        ("wrong kind of value", ("GET", "list")),
        ("wrong kind of value", ("LPUSH", "word", 1)),
        ("syntax error", ("SET", "a", "b", "ZZ")),
        ("wrong number of arguments for 'mset' command", ("MSET", "a", "b", "c")),
    ]:
        with pytest.raises(redis.ResponseError, match=message):
            client.execute_command(*command)
    assert client.ping()


def test_keys_expire(monkeypatch: pytest.MonkeyPatch, clock: FakeClock) -> None:
    monkeypatch.setattr(MiniRedis, "store", Store(clock))
    with served(MiniRedis) as server:
        with redis.Redis("127.0.0.1", server.server_address[1], protocol=2) as client:
            client.set("soon", 1, ex=10)
            client.set("later", 1)
            assert (client.ttl("soon"), client.ttl("later"), client.ttl("nothing")) == (10, -1, -2)
            assert (client.expire("later", 20), client.expire("nothing", 1)) == (True, False)
            clock.jump(11)
            assert (client.get("soon"), client.ttl("later")) == (None, 9)
            client.connection_pool.disconnect()


def test_client_list_reads_the_request_table_and_client_kill_ends_a_row(client: Any) -> None:
    with redis.Redis("127.0.0.1", client.connection_pool.connection_kwargs["port"], protocol=2) as other:
        other.ping()
        rows = client.client_list()
        assert len(rows) == 2
        own = client.client_id()
        [mine] = [row for row in rows if int(row["id"]) == own]
        [victim] = [row for row in rows if int(row["id"]) != own]
        assert (mine["state"], victim["state"]) == ("RUNNING", "READING")
        assert client.client_kill(victim["addr"])
        assert len(client.client_list()) == 1
        assert other.ping()  # by a new connection
        assert client.client_kill_filter(_id=other.client_id()) == 1
        with pytest.raises(redis.ResponseError, match="No such client"):
            client.client_kill("127.0.0.1:1")
        other.connection_pool.disconnect()


@pytest.mark.parametrize("split", ["whole", "byte by byte"])
@pytest.mark.parametrize(
    ("given", "answer"),
    [
        (b"PING\r\nPING hello\r\n", b"+PONG\r\n$5\r\nhello\r\n"),
        (b"\r\n\nPING\n", b"+PONG\r\n"),
        (b"*0\r\n*1\r\n$4\r\nping\r\n", b"+PONG\r\n"),
        (b"*2\r\n$4\r\nECHO\r\n$0\r\n\r\n", b"$0\r\n\r\n"),
        (b"QUIT\r\nPING\r\n", b"+OK\r\n"),
        (b"*x\r\n", b"-ERR Protocol error: invalid multibulk length\r\n"),
        (b"*1\r\n!4\r\n", b"-ERR Protocol error: invalid bulk length\r\n"),
        (b"*1\r\n$99999999\r\n", b"-ERR Protocol error: invalid bulk length\r\n"),
        (b"x" * 70_000, b"-ERR Protocol error: too big inline request\r\n"),
    ],
)
@pytest.mark.usefixtures("fresh_store")
def test_the_protocol(clock: FakeClock, given: bytes, answer: bytes, split: str) -> None:
    world = World(clock, MiniRedis)
    peer, _ = world.connect()
    step = 70_000 if split == "whole" else max(1, len(given) // 700)
    for start in range(0, len(given), step):
        peer.send(given[start : start + step])
        world.passes()
    world.passes(2)
    assert peer.recv(1000) == answer
    world.close()


# -- tftp ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "outside").write_bytes(b"secret")
    monkeypatch.setattr(Tftp, "root", inside)
    return inside


@pytest.mark.parametrize("size", [0, 511, 512, 100_000])
def test_curl_fetches_a_file(folder: Path, size: int) -> None:
    (folder / "file").write_bytes(data := os.urandom(size))
    with serving(UDPServer(("127.0.0.1", 0), Tftp)) as server:
        url = f"tftp://127.0.0.1:{server.server_address[1]}/file"
        assert run(program("curl"), "--silent", "--show-error", "--max-time", "15", url) == data
        wait_until(server, lambda: len(server.table) == 0)


def tftp_world(clock: FakeClock) -> Any:
    return Stepwise(clock, Tftp)


def test_a_lost_block_is_sent_again_and_a_duplicate_acknowledgement_is_not_answered(
    folder: Path, clock: FakeClock
) -> None:
    data = bytes(range(256)) * 5
    (folder / "file").write_bytes(data)
    with tftp_world(clock) as world, peer_of(world.server) as peer:
        peer.setblocking(False)
        peer.send(b"\0\1file\0octet\0")
        world.passes()
        first = peer.recv(1000)
        assert first == b"\0\3\0\1" + data[:512]
        clock.jump(1)  # nothing is acknowledged
        world.passes()
        assert peer.recv(1000) == first
        for _ in range(2):
            peer.send(b"\0\4\0\1")
        world.passes()
        assert peer.recv(1000) == b"\0\3\0\2" + data[512:1024]
        with pytest.raises(BlockingIOError):
            peer.recv(1000)
        peer.send(b"\0\4\0\2")
        world.passes()
        assert peer.recv(1000) == b"\0\3\0\3" + data[1024:]
        for _ in range(Tftp.resends_max + 1):
            assert len(world.server.table) == 1
            clock.jump(1)
            world.passes()
        assert len(world.server.table) == 0  # it gave up


@pytest.mark.parametrize(
    ("packet", "error"),
    [
        (b"\0\1nothing\0octet\0", b"\0\5\0\1there is no such file\0"),
        (b"\0\1../outside\0octet\0", b"\0\5\0\1there is no such file\0"),
        (b"\0\1/etc/passwd\0octet\0", b"\0\5\0\1there is no such file\0"),
        (b"\0\2file\0octet\0", b"\0\5\0\2this server is read-only\0"),
        (b"\0\1file", b"\0\5\0\4a read request is a name and a mode\0"),
        (b"\xff\xff", b"\0\5\0\4a transfer begins with a read request\0"),
        (b"", b"\0\5\0\4a transfer begins with a read request\0"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_a_request_that_can_not_be_served(clock: FakeClock, packet: bytes, error: bytes) -> None:
    with tftp_world(clock) as world, peer_of(world.server) as peer:
        peer.send(packet)
        world.passes()
        assert peer.recv(1000) == error
        assert len(world.server.table) == 0


# -- timeserver ------------------------------------------------------------------------------------------------------


def test_the_time_over_a_unix_datagram_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "time.sock")
    with serving(UnixDatagramServer(path, Time)):
        command = [program("socat"), "-", f"unix-sendto:{path},bind={tmp_path}/asker.sock"]
        before = int(time.time())
        with Started(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as asker:
            assert asker.stdin is not None
            assert asker.stdout is not None
            asker.stdin.write(b"%%Y is a year\n")
            assert asker.stdout.readline() == b"%Y is a year\n"
            asker.stdin.write(b"\n")
            assert before <= int(asker.stdout.readline()) <= time.time() + 1
            asker.terminate()  # with the end of its input it would wait for more
            assert asker.stdout.read() == b""


# -- files -----------------------------------------------------------------------------------------------------------


def test_files_are_shared_between_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FILES_FOLDER", str(tmp_path))
    with served(Files, "fork") as server:
        writer, reader = Client(server.server_address), Client(server.server_address)
        assert reader.ask(b"get poem\n") == b"error: no such file\n"
        assert writer.ask(b"put poem 14\nroses are red\n") == b"ok\n"
        wait_until(server, lambda: len(server.active_children) == 2)
        assert reader.ask(b"words poem\n") == b"ok 3\n", "one child sees what another has written"
        assert reader.ask(b"get poem\n") == b"ok 14\n"
        assert reader.line() == b"roses are red\n"
        assert reader.ask(b"list\n") == b"ok poem\n"
        for bad in (b"get ../etc/passwd\n", b"put poem x\n", b"put poem 99999999999\n", b"what\n", b"\xff\n"):
            assert reader.ask(bad).startswith(b"error: ")
        writer.send(b"put half 100\nnot all").end()
        assert writer.rest() == b"error: the end of file came before the end of the data\n"
        for client in (writer, reader):
            client.hang_up()
        wait_until(server, lambda: len(server.table) == 0)
    assert [each.name for each in tmp_path.iterdir()] == ["poem"]
