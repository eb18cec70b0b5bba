"""What clients of `examples/miniredis.py` wait for: messages of other clients, and items of lists."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from examples.miniredis import MiniRedis, Store
from reqtable import Limits
from reqtable.testing import FakeClock
from tests.support import WAIT_S, Client, Started, served, wait_until
from tests.test_examples import program, run
from tests.test_loop import World


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store()
    monkeypatch.setattr(MiniRedis, "store", store)
    return store


class Talk(World):
    """Clients of one miniredis on a simulated network: each `say` is answered before it returns."""

    def __init__(self, clock: FakeClock, **limits: Any) -> None:
        super().__init__(clock, MiniRedis, **limits)

    def client(self) -> Any:
        peer, _ = self.connect()
        self.passes()
        return peer

    def say(self, peer: Any, text: bytes) -> bytes:
        peer.send(text)
        self.passes(2)
        return self.heard(peer)

    def heard(self, peer: Any) -> bytes:
        self.passes(2)
        try:
            return peer.recv(2**20)  # type: ignore[no-any-return]
        except BlockingIOError:
            return b""


@pytest.fixture
def talk(store: Store, clock: FakeClock) -> Iterator[Talk]:
    world = Talk(clock)
    yield world
    world.close()
    assert store.waiting == {}
    assert store.subscribers == {}


def reply(*parts: bytes | int | None) -> bytes:
    said = b"".join(
        b"$-1\r\n"
        if each is None
        else b":%d\r\n" % each
        if isinstance(each, int)
        else b"$%d\r\n%b\r\n" % (len(each), each)
        for each in parts
    )
    return b"*%d\r\n%b" % (len(parts), said)


def message(channel: bytes, data: bytes) -> bytes:
    return reply(b"message", channel, data)


# -- BLPOP -----------------------------------------------------------------------------------------------------------


def test_an_item_that_is_there_is_given_at_once(talk: Talk, store: Store) -> None:
    ann = talk.client()
    assert talk.say(ann, b"RPUSH b 1 2\r\nRPUSH c 3\r\nBLPOP a b c 0\r\n") == b":2\r\n:1\r\n" + reply(b"b", b"1")
    assert talk.say(ann, b"BLPOP b 0\r\nEXISTS b\r\nLPOP c\r\nLPOP c\r\n") == (
        reply(b"b", b"2") + b":0\r\n$1\r\n3\r\n$-1\r\n"
    )
    assert store.values == {}


def test_clients_are_served_in_the_order_in_which_they_began_to_wait(talk: Talk, store: Store) -> None:
    ann, bob, cid, pat = (talk.client() for _ in range(4))
    for each, command in ((ann, b"BLPOP a b 0\r\n"), (bob, b"BLPOP b 0\r\n"), (cid, b"BLPOP a b 0\r\n")):
        assert talk.say(each, command) == b""
    # The items are given after the whole command, as redis does it: LPUSH has pushed both by then.
    assert talk.say(pat, b"LPUSH b 1 2\r\nLLEN\r\nLPOP b\r\n") == b":2\r\n-ERR unknown command 'LLEN'\r\n$-1\r\n"
    assert (talk.heard(ann), talk.heard(bob), talk.heard(cid)) == (reply(b"b", b"2"), reply(b"b", b"1"), b"")
    assert talk.say(ann, b"BLPOP a 0\r\nPING\r\n") == b""
    assert talk.say(pat, b"RPUSH a 3 4 5\r\n") == b":3\r\n"
    assert talk.heard(cid) == reply(b"a", b"3")
    assert talk.heard(ann) == reply(b"a", b"4") + b"+PONG\r\n", "what was pipelined waited"
    assert list(store.values[b"a"]) == [b"5"]


def test_the_time_to_wait(talk: Talk, clock: FakeClock) -> None:
    ann, pat = talk.client(), talk.client()
    assert talk.say(ann, b"BLPOP a b 1.5\r\nPING\r\n") == b""
    talk.jump(1.4)
    assert talk.heard(ann) == b""
    talk.jump(0.2)
    assert talk.heard(ann) == b"*-1\r\n+PONG\r\n"
    assert talk.say(pat, b"RPUSH a 1\r\nLPOP a\r\n") == b":1\r\n$1\r\n1\r\n", "nobody waits any more"
    assert talk.say(ann, b"BLPOP a 0\r\n") == b""
    talk.jump(10_000_000)
    assert talk.say(pat, b"RPUSH a 2\r\n") == b":1\r\n"
    assert talk.heard(ann) == reply(b"a", b"2")


def test_an_item_at_the_last_moment_is_not_lost(talk: Talk, clock: FakeClock, store: Store) -> None:
    """The push and the end of the time are seen in one pass."""
    ann, pat = talk.client(), talk.client()
    talk.say(ann, b"BLPOP a 1\r\n")
    talk.say(pat, b"RPUSH a 0\r\n")
    assert talk.heard(ann) == reply(b"a", b"0")  # so the end of the time is looked at before the messages
    assert talk.say(ann, b"BLPOP a 1\r\n") == b""
    pat.send(b"RPUSH a 1\r\n")
    talk.jump(1)
    assert talk.heard(pat) == b":1\r\n"
    assert talk.heard(ann) == reply(b"a", b"1")
    assert talk.say(ann, b"BLPOP a 1\r\n") == b"", "nothing of the last wait is left"
    assert store.values == {}
    ann.close()
    talk.passes(2)


@pytest.mark.parametrize("leaves", ["end of file", "reset", "killed"])
def test_the_item_of_a_client_that_leaves_at_that_moment_is_given_to_the_next(
    talk: Talk, store: Store, leaves: str
) -> None:
    ann, bob, pat = (talk.client() for _ in range(3))
    assert talk.say(ann, b"BLPOP a 0\r\n") == b""
    assert talk.say(bob, b"BLPOP a 0\r\n") == b""
    pat.send(b"RPUSH a 1\r\n" + b"CLIENT KILL ID 1\r\n" * (leaves == "killed"))
    if leaves == "reset":
        ann.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        ann.close()
    elif leaves == "end of file":
        ann.close()
    talk.passes(4)
    assert talk.heard(bob) == reply(b"a", b"1")
    assert store.values == {}
    assert talk.say(pat, b"RPUSH a 2\r\nLRANGE a 0 -1\r\n").endswith(b":1\r\n" + reply(b"2"))


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (b"BLPOP a", b"wrong number of arguments for 'blpop' command"),
        (b"BLPOP a -1", b"timeout is negative"),
        (b"BLPOP a x", b"timeout is not a float or out of range"),
        (b"BLPOP a inf", b"timeout is not a float or out of range"),
    ],
)
def test_a_wait_that_redis_refuses(talk: Talk, command: bytes, error: bytes) -> None:
    assert talk.say(talk.client(), command + b"\r\n") == b"-ERR " + error + b"\r\n"


def test_a_list_of_another_kind(talk: Talk) -> None:
    said = talk.say(talk.client(), b"SET a x\r\nBLPOP a 1\r\nRPUSH a 1\r\n")
    assert said.count(b"-WRONGTYPE") == 2


# -- SUBSCRIBE -------------------------------------------------------------------------------------------------------


def test_messages_go_to_the_subscribers(talk: Talk) -> None:
    ann, bob, pat = (talk.client() for _ in range(3))
    assert talk.say(ann, b"SUBSCRIBE news sport news\r\n") == (
        reply(b"subscribe", b"news", 1) + reply(b"subscribe", b"sport", 2) + reply(b"subscribe", b"news", 2)
    )
    assert talk.say(bob, b"SUBSCRIBE sport\r\n") == reply(b"subscribe", b"sport", 1)
    assert talk.say(pat, b"PUBLISH news a\r\nPUBLISH sport b\r\nPUBLISH none c\r\n") == b":1\r\n:2\r\n:0\r\n"
    assert talk.heard(ann) == message(b"news", b"a") + message(b"sport", b"b")
    assert talk.heard(bob) == message(b"sport", b"b")
    assert talk.say(ann, b"UNSUBSCRIBE news other\r\n") == (
        reply(b"unsubscribe", b"news", 1) + reply(b"unsubscribe", b"other", 1)
    )
    assert talk.say(pat, b"PUBLISH news d\r\nPUBLISH sport e\r\n") == b":0\r\n:2\r\n"
    assert talk.heard(ann) == message(b"sport", b"e")
    assert talk.say(ann, b"UNSUBSCRIBE\r\nPING\r\nUNSUBSCRIBE\r\n") == (
        reply(b"unsubscribe", b"sport", 0) + b"+PONG\r\n" + reply(b"unsubscribe", None, 0)
    )
    ann.close()
    bob.close()
    talk.passes(2)
    assert talk.say(pat, b"PUBLISH sport f\r\n") == b":0\r\n"


def test_a_subscriber_may_only_do_so_much(talk: Talk) -> None:
    ann = talk.client()
    talk.say(ann, b"SUBSCRIBE news\r\n")
    assert talk.say(ann, b"*1\r\n$4\r\nPING\r\nPING hello\r\n\r\n*0\r\nNOSUCH\r\nSUBSCRIBE\r\nget a\r\n") == (
        reply(b"pong", b"")
        + reply(b"pong", b"hello")
        + b"-ERR unknown command 'NOSUCH'\r\n"
        + b"-ERR wrong number of arguments for 'subscribe' command\r\n"
        + b"-ERR Can't execute 'get': only (P|S)SUBSCRIBE / (P|S)UNSUBSCRIBE / PING / QUIT / RESET are allowed in this "
        b"context\r\n"
    )
    assert talk.say(ann, b"QUIT\r\nPING\r\n") == b"+OK\r\n"
    assert talk.heard(ann) == b""


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_subscriber_whose_commands_come_in_parts_gets_messages_between_them(talk: Talk, size: int) -> None:
    ann, pat = talk.client(), talk.client()
    talk.say(ann, b"SUBSCRIBE a\r\n")
    command = b"*3\r\n$9\r\nSUBSCRIBE\r\n$1\r\nb\r\n$2\r\n\r\n\r\nPING x\r\n"
    heard = b""
    for start in range(0, len(command), size):
        ann.send(command[start : start + size])
        assert talk.say(pat, b"PUBLISH a .\r\n") == b":1\r\n"
        heard += talk.heard(ann)
    assert heard.count(message(b"a", b".")) == len(range(0, len(command), size))
    assert heard.replace(message(b"a", b"."), b"") == (
        reply(b"subscribe", b"b", 2) + reply(b"subscribe", b"\r\n", 3) + reply(b"pong", b"x")
    )


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (b"*x\r\n", b"invalid multibulk length"),
        (b"*99999999\r\n", b"invalid multibulk length"),
        (b"*1\r\n!4\r\n", b"invalid bulk length"),
        (b"*1\r\n$-1\r\n", b"invalid bulk length"),
        (b"x" * 70_000, b"too big inline request"),
    ],
)
def test_what_is_no_command_ends_a_subscriber(talk: Talk, given: bytes, why: bytes) -> None:
    ann = talk.client()
    talk.say(ann, b"SUBSCRIBE a\r\n")
    ann.send(given[:65_536])
    talk.passes(2)
    assert talk.say(ann, given[65_536:]) == b"-ERR Protocol error: " + why + b"\r\n"
    talk.passes(3)
    assert talk.server.stats()["finished"]["error"] == 0


def test_messages_come_before_the_answer_that_ends_the_subscription(talk: Talk) -> None:
    """All is in one pass: what was published before UNSUBSCRIBE must not come after its answer, or never."""
    ann, pat = talk.client(), talk.client()
    talk.say(ann, b"SUBSCRIBE a\r\n")
    pat.send(b"PUBLISH a 1\r\nPUBLISH a 2\r\n")
    ann.send(b"UNSUBSCRIBE a\r\nPING\r\nSUBSCRIBE b\r\n")
    heard = talk.heard(ann)
    talk.passes(3)
    published = talk.heard(pat).count(b":1")
    expected = b"".join(message(b"a", b"%d" % (number + 1)) for number in range(published))
    assert heard == expected + reply(b"unsubscribe", b"a", 0) + b"+PONG\r\n" + reply(b"subscribe", b"b", 1)


def test_a_slow_subscriber_is_disconnected_and_holds_up_nobody(store: Store) -> None:
    size = 10_000
    with served(MiniRedis, limits=Limits(told_max=10)) as server:
        with (
            Client(server.server_address) as slow,
            Client(server.server_address) as fast,
            Client(server.server_address) as pat,
        ):
            for each in (slow, fast):
                assert each.send(b"SUBSCRIBE a\r\n").receive(len(reply(b"subscribe", b"a", 1)))
            told = message(b"a", b"x" * size)
            count = 0
            while (answer := pat.ask(b"PUBLISH a %b\r\n" % (b"x" * size))) == b":2\r\n":
                assert fast.receive(len(told)) == told
                count += 1
                assert count < 10_000
            assert answer == b":1\r\n"
            assert fast.receive(len(told)) == told
            wait_until(server, lambda: len(server.table) == 2)
            assert server.stats()["finished"]["cancelled"] == 1


# -- real clients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "pool", "thread"])
def test_the_redis_package_waits(store: Store, dispatch: str) -> None:
    with served(MiniRedis, dispatch) as server:
        client = redis.Redis("127.0.0.1", server.server_address[1], protocol=2, socket_timeout=WAIT_S)
        with client, client.pubsub() as listener:
            assert client.rpush("queue", "a", "b") == 2
            assert client.blpop(["none", "queue"], timeout=5) == (b"queue", b"a")
            assert client.lpop("queue") == b"b"
            assert client.blpop("queue", timeout=0.01) is None
            popped: list[Any] = []
            waiter = threading.Thread(target=lambda: popped.append(client.blpop(["x", "queue"])))
            waiter.start()
            wait_until(server, lambda: b"queue" in store.waiting)
            client.rpush("queue", "c")
            waiter.join(WAIT_S)
            assert popped == [(b"queue", b"c")]

            listener.subscribe("news", "sport")
            got = [listener.get_message(timeout=WAIT_S) for _ in range(2)]
            assert [(each["type"], each["data"]) for each in got] == [("subscribe", 1), ("subscribe", 2)]
            assert client.publish("news", "hello") == 1
            assert listener.get_message(timeout=WAIT_S)["data"] == b"hello"
            listener.ping()
            assert listener.get_message(timeout=WAIT_S)["type"] == "pong"
            listener.unsubscribe()
            assert {listener.get_message(timeout=WAIT_S)["channel"] for _ in range(2)} == {b"news", b"sport"}
            assert client.publish("news", "hello") == 0
        client.connection_pool.disconnect()
        wait_until(server, lambda: len(server.table) == 0)


def test_redis_cli_waits(store: Store) -> None:
    with served(MiniRedis) as server:
        cli = [program("redis-cli"), "-p", str(server.server_address[1])]
        with Started([*cli, "BLPOP", "a", "b", "0"], stdout=subprocess.PIPE) as waiter:
            wait_until(server, lambda: b"b" in store.waiting)
            assert run(*cli, "RPUSH", "b", "item").strip() == b"1"
            assert waiter.stdout is not None
            assert waiter.stdout.read().split() == [b"b", b"item"]
        with Started([*cli, "SUBSCRIBE", "news"], stdout=subprocess.PIPE) as listener:
            wait_until(server, lambda: b"news" in store.subscribers)
            assert run(*cli, "PUBLISH", "news", "hello").strip() == b"1"
            assert listener.stdout is not None
            lines = [listener.stdout.readline().strip() for _ in range(6)]
            assert lines == [b"subscribe", b"news", b"1", b"message", b"news", b"hello"]
            listener.terminate()
        wait_until(server, lambda: not store.subscribers)
