"""`save_state` and `restore_state`: what requests share goes with them over a restart."""

from __future__ import annotations

import logging
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest

import reqtable
from reqtable import HandlerError, NotMovable, StateRequestHandler, line, state
from reqtable.handover.channel import Assembler, packets_of
from reqtable.handover.messages import Share
from reqtable.server.shared_state import SharedState, restore_states, save_states
from reqtable.table import plain
from tests.pages import titled
from tests.restarted import Program
from tests.websockets_by_hand import binary, handshake, text

ANY = ("127.0.0.1", 0)


class Machine(StateRequestHandler):
    @state(line())
    def echo(self, text: bytes) -> Any:
        self.send(text)
        return self.echo


class Shared(Machine):
    kept: ClassVar[Any] = None

    @classmethod
    def save_state(cls, server: Any) -> Any:  # noqa: ARG003
        return cls.kept

    @classmethod
    def restore_state(cls, server: Any, data: Any) -> None:
        cls.kept = (server, data)


class SharingServer(reqtable.TCPServer):
    kept: Any = None

    def save_state(self) -> Any:
        return self.kept

    def restore_state(self, data: Any) -> None:
        self.kept = (self, data)


# -- the hooks ---------------------------------------------------------------------------------------------------------


def plain_method(self: Any, server: Any) -> Any: ...
def too_few(cls: Any) -> Any: ...
async def waits(cls: Any, server: Any, data: Any) -> Any: ...


@pytest.mark.parametrize(
    ("hook", "said"),
    [
        ({"save_state": plain_method}, "Chat.save_state must be a class method, because it is called for the server"),
        ({"save_state": plain_method}, r"write @classmethod, then def save_state\(cls, server\)"),
        ({"restore_state": plain_method}, r"write @classmethod, then def restore_state\(cls, server, data\)"),
        ({"save_state": classmethod(too_few)}, r"too_few is called with \(cls, server\), but takes other arguments"),
        ({"restore_state": classmethod(too_few)}, r"too_few is called with \(cls, server, data\)"),
        ({"restore_state": classmethod(waits)}, "waits is async def, but is called as a plain function"),
    ],
)
def test_a_wrong_hook_of_a_handler_is_told_with_its_class(hook: dict[str, Any], said: str) -> None:
    with pytest.raises(HandlerError, match=said):
        type("Chat", (Machine,), hook)


class OnlySaving(reqtable.TCPServer):
    def save_state(self) -> Any: ...


class OnlyRestoring(reqtable.TCPServer):
    def restore_state(self, data: Any) -> Any: ...


class AsyncSaving(reqtable.TCPServer):
    async def save_state(self) -> Any: ...

    def restore_state(self, data: Any) -> Any: ...


class HandlerSaving(Machine):
    @classmethod
    def save_state(cls, server: Any) -> Any: ...


class BlockingSaving(reqtable.StreamRequestHandler):
    @classmethod
    def save_state(cls, server: Any) -> Any: ...


@pytest.mark.parametrize(
    ("server_class", "handler", "said"),
    [
        (OnlySaving, Machine, "^OnlySaving.save_state is there without restore_state: write both, or give it another"),
        (OnlyRestoring, Machine, "^OnlyRestoring.restore_state is there without save_state: write both"),
        (AsyncSaving, Machine, "^AsyncSaving.save_state is async def"),
        (reqtable.TCPServer, HandlerSaving, "^HandlerSaving.save_state is there without restore_state"),
        (reqtable.TCPServer, BlockingSaving, "^BlockingSaving.save_state is there without restore_state"),
    ],
)
def test_a_wrong_hook_is_told_when_serving_begins(server_class: Any, handler: Any, said: str) -> None:
    with server_class(ANY, handler) as server, pytest.raises(HandlerError, match=said):
        server.serve_forever()


def test_a_method_that_a_program_has_for_itself_is_no_hook(caplog: pytest.LogCaptureFixture) -> None:
    class Server(reqtable.TCPServer):
        def save_state(self, path: Path) -> None: ...

        def on_start(self) -> None:
            self.engine.post(self.shutdown)

    with Server(ANY, Machine) as server, caplog.at_level(logging.WARNING, "reqtable"):
        server.serve_forever()
        assert save_states([server]) == []
    assert "Server.save_state is not called as a hook, because it takes other arguments" in caplog.text.replace(
        "test_a_method_that_a_program_has_for_itself_is_no_hook.<locals>.", ""
    )
    assert "docs/how-to/keep-shared-data.md" in caplog.text


# -- the data ----------------------------------------------------------------------------------------------------------


class Colour(Enum):
    RED = 1


class Place(NamedTuple):
    name: str
    things: Any


@pytest.mark.parametrize(
    ("data", "place", "why"),
    [
        (object(), "", "a builtins.object is no plain data"),
        ({"rooms": {"tea": [1, object()]}}, "['rooms']['tea'][1]", "a builtins.object"),
        ([Place("a", {"x": iter(())})], "[0][1]['x']", "iterator"),
        ([(1, {len})], "[0][1][<built-in function len>]", "builtin"),
        ({len: 1}, "[<built-in function len>]", "builtin"),
    ],
)
def test_what_is_no_plain_data_is_told_by_the_hook_and_its_place(data: Any, place: str, why: str) -> None:
    class Server(SharingServer):
        kept = data

    with Server(ANY, Machine) as server, pytest.raises(NotMovable) as caught:
        save_states([server])
    said = str(caught.value)
    assert said.startswith(f"SharingServer.save_state returned data{place} that can't move: ")
    assert why in said
    assert "\n" not in said


def test_data_that_contains_itself_has_a_place() -> None:
    data: list[Any] = []
    data.append(data)
    assert plain.place_of(data).startswith("[0][0]")


def test_what_a_hook_raises_is_told_with_its_name() -> None:
    class Server(SharingServer):
        def save_state(self) -> Any:
            raise KeyError("room")

    with Server(ANY, Machine) as server, pytest.raises(NotMovable, match=r"Server\.save_state raised KeyError: 'room'"):
        save_states([server])


def test_the_server_and_the_handlers_get_their_own() -> None:
    with SharingServer(ANY, Shared) as old, SharingServer(ANY, Shared) as new:
        old.kept, Shared.kept = {1: {"a"}}, [Colour.RED, (b"x", None)]
        states = save_states([old])
        restore_states([new], states, only_checks=True)
        assert new.kept is None  # a check calls no hook
        restore_states([new], states)  # the only server takes it, although its address is another one
        assert new.kept == (new, {1: {"a"}})
        assert Shared.kept == (new, [Colour.RED, (b"x", None)])


@pytest.mark.parametrize("only_checks", [True, False])
def test_state_that_no_hook_takes_is_refused(only_checks: bool) -> None:
    with reqtable.TCPServer(ANY, Machine) as server, SharingServer(ANY, Machine) as other:
        place = ":".join(map(str, server.server_address))
        said = f"nothing takes what save_state of the server at {place} returned: write restore_state"
        with pytest.raises(reqtable.ReqtableError, match=said):
            restore_states([server, other], [SharedState("server", place, plain.encode(1))], only_checks)
        with pytest.raises(reqtable.ReqtableError, match=r"server at 192.0.2.1:7 returned"):
            restore_states([server, other], [SharedState("server", "192.0.2.1:7", plain.encode(1))], only_checks)
        restore_states([server], [SharedState("server", place, plain.encode(None))], only_checks)  # nothing is lost


@pytest.mark.parametrize("only_checks", [True, False])
def test_data_that_can_not_be_read_is_refused_with_the_hook(only_checks: bool) -> None:
    with SharingServer(ANY, Machine) as server, pytest.raises(reqtable.ReqtableError, match=r"^SharingServer\.restore"):
        restore_states([server], [SharedState("server", "", b"\xc1")], only_checks)


def test_a_large_state_goes_in_packets_and_arrives_whole() -> None:
    message = Share([SharedState("server", "x", bytes(range(256)) * 4096)], False)
    packets = packets_of(message, range(600))
    assembler = Assembler()
    found = [assembler.add(data, descriptors) for data, descriptors in packets]
    assert found[:-1] == [None] * (len(packets) - 1)
    assert found[-1] == (message, list(range(600)))
    assert max(len(data) for data, _ in packets) <= 32_768


# -- fields that are not declared -------------------------------------------------------------------------------------


# -- restarts ----------------------------------------------------------------------------------------------------------

ROOM = """
import os
from enum import Enum
from reqtable import StateRequestHandler, line, state

class Mood(Enum):
    CALM = 1

class Ledger(StateRequestHandler):
    members = {}  # by name: the ids
    moods = [Mood.CALM]
    extra = None
    saves = 0

    name: str = ""

    @classmethod
    def save_state(cls, server):
        cls.saves += 1
        return {"members": cls.members, "moods": cls.moods, "saves": cls.saves, "extra": cls.extra}

    @classmethod
    def restore_state(cls, server, data):
        cls.members = {name: id for name, id in data["members"].items() if server.table.get(id)}
        cls.moods, cls.saves = data["moods"], data["saves"]

    @state(line())
    def talk(self, text):
        verb, _, rest = text.decode().strip().partition(" ")
        if verb == "name":
            self.members[rest] = self.entry.id
            return self.talk
        if verb == "lock":
            type(self).extra = [{1, 2}, {"lock": os.scandir}]
        if verb == "unlock":
            type(self).extra = None
        if verb == "pid":
            self.send(f"{os.getpid()} {self.saves} {self.moods}\\n".encode())
        if verb == "say":
            for id in self.members.values():
                self.server.table.get(id).handler.send(rest.encode() + b"\\n")
        return self.talk
"""


def check(program: Program) -> dict[str, Any]:
    """Ask whether a restart would work, and wait until the process that was started for this has gone."""
    outcome = program.restart(check=True)
    program.wait_exit(program.pids[-1])
    return outcome


def test_members_find_each_other_after_a_restart_and_nothing_is_lost_when_it_is_refused(tmp_path: Path) -> None:
    with Program(tmp_path, ROOM) as program, program.client() as ann, program.client() as bob:
        for each, name in ((ann, b"ann"), (bob, b"bob")):
            assert each.send(b"name %b\n" % name).ask(b"pid\n")

        def all_hear(text: bytes) -> None:
            ann.send(b"say " + text)
            assert (ann.line(), bob.line()) == (text, text)

        def pid() -> int:
            return int(ann.ask(b"pid\n").split()[0])

        all_hear(b"before\n")
        assert ann.ask(b"pid\n") == b"%d 0 [<Mood.CALM: 1>]\n" % program.pid
        assert check(program)["problem"] is None
        moved = program.moved()
        assert (moved["moved"], moved["left"]) == (2, 0)
        assert ann.ask(b"pid\n") == b"%d 3 [<Mood.CALM: 1>]\n" % program.pids[-1]  # the check, the rehearsal, the move
        all_hear(b"after\n")

        here = pid()
        bob.send(b"lock\n")
        all_hear(b"locked\n")
        why = "Ledger.save_state returned data['extra'][1]['lock'] that can't move: a builtins.builtin_function"
        assert check(program)["problem"].startswith(why)
        assert program.refused().startswith(why)
        bob.send(b"unlock\n")
        all_hear(b"unlocked\n")

        for old, new, said in (
            ("    def restore_state", "    def other", "Ledger.save_state is there without restore_state"),
            ("def save_state", "def other", "Ledger.restore_state is there without save_state"),
            ("cls.moods, cls.saves =", "1 / 0 #", "Ledger.restore_state raised ZeroDivisionError: division by zero"),
        ):
            assert old in ROOM
            program.change(ROOM.replace(old, new))
            assert said in program.refused(), program.log
            assert pid() == here
            all_hear(b"still\n")
        program.change(ROOM.replace("cls.saves += 1", "1 / 0"))
        program.moved()  # the hook of the old process has saved
        all_hear(b"moved\n")
        assert "Ledger.save_state raised ZeroDivisionError: division by zero" in program.refused()
        all_hear(b"to the end\n")


def test_an_attribute_that_is_no_field_keeps_its_request_in_the_old_process(tmp_path: Path) -> None:
    source = ROOM.replace('    name: str = ""\n', "").replace(
        'if verb == "name":', 'if verb == "name":\n            self.nick = rest'
    )
    with Program(tmp_path, source) as program, program.client() as ann, program.client() as bob:
        ann.send(b"name ann\n")
        assert ann.ask(b"say x\n") == b"x\n"
        assert bob.ask(b"pid\n")
        why = "Ledger.nick is not a declared field, and would be lost: annotate it in the class"
        assert check(program)["immovable"] == {why: 1}
        program.configure('[restart]\nunmovable = "refuse"\n')
        program.operator().post("/v1/reload")
        assert program.refused() == f"some requests can't move: 1 because {why}"
        assert ann.ask(b"say y\n") == b"y\n"


def test_the_room_of_the_documents_moves(tmp_path: Path) -> None:
    with Program(tmp_path, titled("docs/how-to/keep-shared-data.md", "room.py"), handler="Room") as program:
        with program.client() as ann, program.client() as bob:
            for each, name in ((ann, b"ann\n"), (bob, b"bob\n")):
                assert each.send(name).ask(b"in\n") == name.strip() + b": in\n"
            assert ann.line() == b"bob: in\n"
            with program.client() as nameless:
                nameless.send(b"\n")
            program.moved()
            ann.send(b"hello\n")
            assert (ann.line(), bob.line()) == (b"ann: hello\n", b"ann: hello\n")


def test_the_rooms_of_the_documents_move(tmp_path: Path) -> None:
    with Program(tmp_path, titled("docs/how-to/keep-websockets-open.md", "rooms.py"), handler="Chat") as program:
        with program.client() as ann, program.client() as bob, program.client() as other:
            for each, path in ((ann, b"/tea"), (bob, b"/tea"), (other, b"/cake")):
                each.send(handshake(path=path))
                while each.line() != b"\r\n":
                    pass
            program.moved()
            ann.send(binary(b"\xff\xfe") + text("hello"))
            assert [each.receive(7) for each in (ann, bob)] == [b"\x81\x05hello"] * 2
            other.send(text("alone"))
            assert other.receive(7) == b"\x81\x05alone"
