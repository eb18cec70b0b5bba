"""`exercise()` with more peers than the client: connects, several wants at once, messages, STARTTLS."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

import reqtable
from reqtable import (
    AsyncRequestHandler,
    ConnectFailed,
    Limits,
    State,
    StateRequestHandler,
    call,
    chunk,
    connect,
    disconnected,
    either,
    end_output,
    line,
    parsed,
    sleep,
    start_tls,
    state,
    told,
)
from reqtable.testing import Client, Other, exercise

UP = "tcp://up.example:9000"


class Proxy(AsyncRequestHandler):
    """Forwards bytes both ways."""

    async def handle(self) -> None:
        up = await self.read(connect(UP))
        ended = 0
        while ended < 2:
            side, data = await self.read(either(chunk(), up.chunk()))
            if data:
                self.send(data) if side else up.send(data)
            else:
                ended += 1
                await self.read(end_output()) if side else up.end_output()


class Asks(StateRequestHandler):
    """Sends each line to another server, and its answer back."""

    errors: tuple[str, ...] = ()

    @state(line(), timeout=30)
    def asked(self, text: bytes) -> Any:
        self.text = text
        return self.connected, connect(UP, reuse=True)

    @state()
    def connected(self, up: Any) -> Any:
        self.up = up
        up.send(self.text)
        return self.answered, up.line()

    @state(timeout=5)
    def answered(self, text: bytes) -> Any:
        self.send(text)
        self.up.release()
        return self.asked

    def on_error(self, error: Exception) -> Any:
        self.errors = (*self.errors, f"{type(error).__name__}: {error}")
        return self.asked


class Waits(AsyncRequestHandler):
    """Sends what has come of all that it waits for."""

    wants: Any = ()
    timeout: float | None = None

    async def handle(self) -> None:
        while True:
            try:
                index, item = await self.read(either(*self.wants), timeout=self.timeout)
            except TimeoutError:
                self.send(b"late\n")
                continue
            self.send(b"%d %r\n" % (index, item))
            if item == b"":
                return


def waits(*wants: Any, timeout: float | None = None) -> Any:
    return type("Waits", (Waits,), {"wants": wants, "timeout": timeout})


# -- a request that is WAITING ----------------------------------------------------------------------------------------


def test_input_and_its_end_while_it_waits_for_several_things() -> None:
    tried = exercise(waits(line(), told()))
    assert tried.entry.state is State.WAITING
    tried.expect(b"").send(b"a").expect(b"").send(b"b\nc\nd").expect(b"0 b'ab\\n'\n0 b'c\\n'\n")
    tried.end().expect(b"0 b'd'\n0 b''\n").expect_end()
    assert tried.is_over


def test_a_script_plays_the_clients_part() -> None:
    script = Client().send(b"a\n").expect(b"0 b'a\\n'\n").pause(9).expect(b"1 None\n").end().expect(b"0 b''\n")
    exercise(waits(line(), sleep(9)), script.expect_end())


def test_messages() -> None:
    tried = exercise(waits(line(), told())).tell(1).tell("two").expect(b"1 1\n1 'two'\n").send(b"a\n")
    tried.expect(b"0 b'a\\n'\n").end()
    with pytest.raises(AssertionError, match="3 was told, and not taken; the request has ended"):
        tried.tell(3)


def test_a_message_that_has_no_room_is_a_failure() -> None:
    tried = exercise(Asks, limits=Limits(told_max=1)).tell(1)
    with pytest.raises(AssertionError, match=r"2 was told, and not taken; the request is READING and waits for line"):
        tried.tell(2)


def test_time_passes_while_it_waits() -> None:
    tried = exercise(waits(line(), sleep(5), sleep(3))).jump(2.9).expect(b"").jump(0.2).expect(b"2 None\n")
    tried.jump(3).expect(b"2 None\n").jump(60).expect(b"2 None\n" * 20)
    exercise(waits(line(), told(), timeout=7)).jump(6.9).expect(b"").jump(0.2).expect(b"late\n").jump(70).expect(
        b"late\n" * 10
    )
    exercise(waits(line(), told()), limits=Limits(request_timeout_s=9)).jump(8.9).expect(b"").jump(0.2).expect_end()


def test_a_call_is_one_of_several_things() -> None:
    class Calls(AsyncRequestHandler):
        async def handle(self) -> None:
            self.send(b"%r" % (await self.read(either(line(), call(len, b"four"), sleep(1))),))
            try:
                await self.read(either(line(), call(int, "x")))
            except ValueError:
                self.send(b" no number")

    exercise(Calls).expect(b"Arrived(index=1, item=4) no number").expect_end()


def test_a_client_that_ends_or_resets() -> None:
    class Notices(AsyncRequestHandler):
        closed = False

        async def handle(self) -> None:
            await self.read(disconnected())
            self.send(b"gone, with %b" % await self.read(line()))

        def on_close(self) -> None:
            self.closed = True

    exercise(Notices).send(b"a\n").expect(b"").end().expect(b"gone, with a\n").expect_end()
    tried = exercise(Notices).send(b"a\n").reset().expect(b"").expect_end()
    assert tried.is_over
    assert tried.handler.closed
    exercise(waits(sleep(9))).reset().expect_end()


def test_a_handler_that_ends_its_output() -> None:
    class Says(AsyncRequestHandler):
        async def handle(self) -> None:
            self.send(b"bye")
            await self.read(end_output())
            self.heard = await self.read(line())

    tried = exercise(Says).expect(b"bye").expect_end()
    assert tried.output_ended
    assert not tried.is_over
    assert tried.send(b"still here\n").handler.heard == b"still here\n"
    assert tried.is_over


def test_a_handler_whose_output_is_not_taken_goes_on_with_other_things() -> None:
    tried = exercise(waits(line(), told())).read_nothing().send(b"a\n").tell(1)
    assert tried.entry.state is State.WAITING
    assert tried.entry.output.size
    tried.expect(b"").read_on().expect(b"0 b'a\\n'\n1 1\n")
    exercise(waits(line(), told())).read_nothing().send(b"a\n").jump(61).expect(b"").expect_end()


def test_messages_of_a_protocol() -> None:
    def netstring(data: bytes) -> tuple[bytes, int] | None:
        size, found, rest = data.partition(b":")
        return (rest[: int(size)], len(size) + 1 + int(size)) if found and len(rest) >= int(size) else None

    tried = exercise(waits(parsed(netstring), told())).send(b"3:on").expect(b"").send(b"e2:it")
    tried.expect(b"0 b'one'\n0 b'it'\n")


def test_datagrams_of_the_client() -> None:
    session = waits(reqtable.datagram(), sleep(5))
    tried = exercise(session, datagrams=True).send(b"a").expect(b"0 b'a'\n").jump(5).expect(b"1 None\n")
    tried.end().read_nothing().send(b"b").read_on().expect(b"0 b'b'\n").reset().expect_end()
    assert tried.is_over
    assert tried.entry.bytes_in == 2
    late = exercise(waits(reqtable.datagram(), told()), datagrams=True).send(b"a").read_nothing().send(b"b").read_on()
    late.jump(100).send(b"c").expect(b"0 b'a'\n").expect(b"0 b'b'\n").expect(b"0 b'c'\n")


def test_the_only_datagram_of_a_client_without_an_address() -> None:
    with pytest.raises(reqtable.IncompleteRead):
        exercise(waits(reqtable.datagram(), sleep(5)), datagrams=True, peer="").send(b"a")


# -- outgoing connections ---------------------------------------------------------------------------------------------


def test_a_proxy() -> None:
    tried = exercise(Proxy)
    up = tried.send(b"early").accept(UP)
    assert isinstance(up, Other)
    up.expect(b"early").send(b"one").send(b"two")
    tried.expect(b"onetwo").send(b"more").end()
    up.expect(b"more").expect_end().send(b"last")
    assert not up.is_over
    up.end()
    tried.expect(b"last").expect_end()
    assert (up.row.peer, up.row.local) == (("192.0.2.2", 9000), ("192.0.2.3", 50_000))
    assert (tried.is_over, up.is_over, up.is_released) == (True, True, False)
    assert not tried.entry.table.connections


def test_a_connect_waits_for_the_test() -> None:
    tried = exercise(Proxy)
    waits_for = rf"the request is WAITING and waits for connect\('{UP}'\)"
    with pytest.raises(AssertionError, match=rf"expected b'x', found b''; {waits_for}"):
        tried.expect(b"x")
    with pytest.raises(AssertionError, match=f"the handler has not asked for tcp://other:1; {waits_for}"):
        tried.accept("tcp://other:1")
    with pytest.raises(AssertionError, match=f"the handler has not asked for tcp://other:1; {waits_for}"):
        tried.refuse("tcp://other:1")
    [row] = tried.entry.table.connections.values()
    assert (tried.entry.state, row.state) == (State.WAITING, State.CONNECTING)
    tried.accept(UP)
    assert row.state is State.WAITING
    with pytest.raises(AssertionError, match="the handler has not asked"):
        tried.accept(UP)


def test_a_refused_connect() -> None:
    tried = exercise(Asks).send(b"a\n").refuse(UP).send(b"b\n").refuse(UP, "no route to host")
    assert tried.handler.errors == (
        f"ConnectFailed: can't connect to {UP}: connection refused",
        f"ConnectFailed: can't connect to {UP}: no route to host",
    )
    tried = exercise(Proxy)
    with pytest.raises(ConnectFailed):
        tried.refuse(UP)
    tried.expect_end()


def test_time_passes_while_it_connects() -> None:
    tried = exercise(Asks).send(b"a\n").jump(9.9)
    assert not tried.handler.errors
    tried.jump(0.2)
    assert tried.handler.errors == (f"ConnectFailed: can't connect to {UP}: not connected within 10 s",)


def test_the_other_sides_failures_name_its_address() -> None:
    tried = exercise(Asks).send(b"a\n")
    up = tried.accept(UP)
    said = rf"the request is WAITING and waits for line\(limit=65536\) of {UP}"
    with pytest.raises(AssertionError, match=rf"expected b'b' at {UP}, found b'a\\n'; {said}"):
        up.expect(b"b")
    with pytest.raises(AssertionError, match=rf"expected the end at {UP}, found b''; {said}"):
        up.expect_end()
    up.end()
    with pytest.raises(AssertionError, match=f"b'x' can't be sent at {UP}: the peer has ended"):
        up.send(b"x")


def test_the_other_side_resets() -> None:
    tried = exercise(Asks).send(b"a\n")
    tried.accept(UP).expect(b"a\n").reset()
    assert tried.handler.errors == ("ConnectionResetError: [Errno 104] Connection reset by peer",)
    assert tried.send(b"b\n").accept(UP).expect(b"b\n").send(b"c\n").is_released
    tried.expect(b"c\n")


def test_a_timeout_of_a_wait_for_the_other_side() -> None:
    tried = exercise(Asks).send(b"a\n")
    up = tried.accept(UP).expect(b"a\n")
    tried.jump(4.9)
    assert not up.is_over
    tried.jump(0.2).expect_end()
    up.expect_end()
    assert up.is_over


def test_a_released_connection_is_used_again() -> None:
    tried = exercise(Asks).send(b"a\n")
    up = tried.accept(UP).expect(b"a\n").send(b"A\n")
    assert (up.is_released, up.is_over, up.output_ended) == (True, False, False)
    tried.expect(b"A\n").send(b"b\n")
    assert not up.is_released
    up.expect(b"b\n").send(b"B\n")
    tried.expect(b"B\n")
    up.end()
    assert up.is_over
    second = tried.send(b"c\n").accept(UP).expect(b"c\n").send(b"C\n")
    tried.jump(3000)
    assert second.is_over


def test_a_closed_connection() -> None:
    class Closes(AsyncRequestHandler):
        async def handle(self) -> None:
            up = await self.read(connect("unix:///run/x.sock"))
            self.send(repr(up.peer).encode())
            up.send(b"dropped")
            up.close()
            await self.read(line())

    tried = exercise(Closes)
    up = tried.accept("unix:///run/x.sock").expect(b"").expect_end()
    assert up.is_over
    with pytest.raises(AssertionError, match=r"x. can.t be sent at unix:///run/x\.sock: the handler has ended"):
        up.send(b"x")
    tried.expect(b"'/run/x.sock'")


def test_the_connections_end_with_the_request() -> None:
    tried = exercise(Proxy)
    up = tried.accept(UP)
    tried.reset()
    up.expect_end()
    assert up.is_over


def test_backpressure() -> None:
    tried = exercise(Proxy, limits=Limits(high_water_bytes=1000))
    up = tried.accept(UP).read_nothing()
    for _ in range(5):
        tried.send(bytes(800))
    row = up.row
    assert row.output.held == 1600  # the mark and one read
    up.send(b"other way")
    tried.expect(b"other way")
    up.read_on().expect(bytes(4000))
    up.read_nothing()
    with pytest.raises(TimeoutError, match="took none of its output for 60 s"):
        tried.send(b"x").jump(61)
    up.expect(b"").expect_end()


def test_two_connections_to_one_address() -> None:
    class Two(AsyncRequestHandler):
        async def handle(self) -> None:
            first = await self.read(either(connect(UP), connect(UP)))
            second = await self.read(connect(UP))
            first.item.send(b"first %d" % first.index)
            second.send(b"second")
            await self.read(line())

    tried = exercise(Two)
    first = tried.accept(UP)
    assert len(tried.entry.table.connections) == 2  # the connect that lost is closed
    second = tried.accept(UP)
    first.expect(b"first 0")
    second.expect(b"second")


def test_datagrams_of_another_peer() -> None:
    class Relay(AsyncRequestHandler):
        async def handle(self) -> None:
            up = await self.read(connect("udp://192.0.2.9:53"))
            up.send(await self.read(line()))
            up.send(b"")
            while True:
                try:
                    self.send(await self.read(up.datagram()) + b"\n")
                except ConnectionRefusedError:
                    return

    tried = exercise(Relay)
    up = tried.accept("udp://192.0.2.9:53")
    tried.send(b"a\n")
    up.expect(b"a\n").expect(b"").send(b"b").send(b"").send(b"c")
    tried.expect(b"b\n\nc\n")
    up.end().send(b"d").reset()
    tried.expect(b"d\n").expect_end()


def test_a_file_for_the_other_side() -> None:
    class Sends(AsyncRequestHandler):
        async def handle(self) -> None:
            up = await self.read(connect(UP))
            up.send_file(io.BytesIO(b"from a file"))
            up.end_output()

    exercise(Sends).accept(UP).expect(b"from a file").expect_end()


def test_a_file_on_disk_is_read_and_never_given_to_the_kernel(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"from a file")
    with path.open("rb") as file:

        class Sends(AsyncRequestHandler):
            async def handle(self) -> None:
                self.send_file(file)

        exercise(Sends).expect(b"from a file").expect_end()


# -- TLS --------------------------------------------------------------------------------------------------------------


class Secures(AsyncRequestHandler):
    """Asks for TLS on both sides, and tells its client what failed."""

    async def handle(self) -> None:
        await self.read(line())
        self.send(b"go ahead\n")
        try:
            await self.read(start_tls(cert="server.pem"))
        except ConnectionError as error:
            self.send(str(error).encode())
            return
        up = await self.read(connect(UP))
        up.send(await self.read(line()))
        await self.read(up.line())
        try:
            await self.read(up.start_tls())
        except ConnectFailed as error:
            self.send(str(error).encode())
        else:
            up.send(b"secret")


def test_start_tls_succeeds_at_once() -> None:
    tried = exercise(Secures)
    assert not tried.is_encrypted
    tried.send(b"STARTTLS\n").expect(b"go ahead\n").send(b"a\n")
    assert tried.is_encrypted
    up = tried.accept(UP).expect(b"a\n")
    assert not up.is_encrypted
    up.send(b"ok\n").expect(b"secret").expect_end()
    assert up.is_encrypted
    tried.expect_end()


def test_start_tls_is_refused() -> None:
    tried = exercise(Secures).refuse_tls("no shared cipher").send(b"STARTTLS\n")
    tried.expect(b"go ahead\nthe TLS handshake failed: no shared cipher").expect_end()
    tried = exercise(Secures).send(b"STARTTLS\n").expect(b"go ahead\n").send(b"a\n")
    up = tried.accept(UP).refuse_tls().expect(b"a\n").send(b"ok\n").expect_end()
    assert not up.is_encrypted
    tried.expect(f"can't connect to {UP}: refused by the test".encode()).expect_end()


def test_input_before_a_handshake_is_an_error() -> None:
    with pytest.raises(reqtable.PeerError, match="input came before the TLS handshake"):
        exercise(Secures).send(b"STARTTLS\nslipped in\n")


def test_datagrams_are_not_encrypted() -> None:
    class Asking(AsyncRequestHandler):
        async def handle(self) -> None:
            up = await self.read(connect("udp://192.0.2.9:53"))
            await self.read(up.start_tls())

    with pytest.raises(reqtable.HandlerError, match=r"start_tls\(\) is for streams"):
        exercise(Asking).accept("udp://192.0.2.9:53")


def test_a_connect_to_a_tls_address_is_encrypted() -> None:
    class Asking(AsyncRequestHandler):
        async def handle(self) -> None:
            await self.read(connect("tls://up.example:443"))

    assert exercise(Asking).accept("tls://up.example:443").is_encrypted


def test_an_empty_send_is_no_end_of_file() -> None:
    exercise(waits(line(), told())).send(b"").send(b"a\n").expect(b"0 b'a\\n'\n")
