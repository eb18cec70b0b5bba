"""`Mover`: turns requests of one engine into records, and goes on with the requests of records."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Container, Iterable, Sequence
from concurrent.futures import Future, wait
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from reqtable.dispatch.checks import is_resumable
from reqtable.handlers.state import StateRequestHandler
from reqtable.loop.freezing import Freezer
from reqtable.loop.step import Steps
from reqtable.server.hosted import Hosted, server_at
from reqtable.server.intake import Intake
from reqtable.table.addresses import address_text
from reqtable.table.errors import NotMovable, ReqtableError
from reqtable.table.record import not_movable, why_not_movable
from reqtable.table.saving import Head, Movable, head_of, read, save
from reqtable.table.snapshot import handler_name, unwrapped
from reqtable.table.states import State
from reqtable.table.table import Entry

_T = TypeVar("_T")
_LOOK_S = 0.1  # how often a thread that waits for the loop looks whether the loop still runs


class Mover:
    """Saves, freezes, thaws and restores the requests of one engine.

    `save` and `restore` may be called from any thread: the loop does it. The others are for the loop's own thread, or
    while no loop runs.
    """

    def __init__(self, steps: Steps, servers: Sequence[Hosted], intake: Intake) -> None:
        self._steps = steps
        self._servers = servers
        self._intake = intake
        self.freezer = Freezer(steps)

    def movable(self, ids: Iterable[int] | None = None, but: Container[int] = ()) -> Iterable[Entry]:
        """Return the requests with these ids. Raises NotMovable if one can't move now.

        Without ids, look one by one for the requests that can move now, without those whose ids are in `but`.
        """
        table = self._steps.table
        if ids is None:
            return (each for each in table if each.id not in but and why_not_movable(each) is None)
        found = []
        for id in ids:
            entry = table.get(id)
            if entry is None or entry.state is State.CLOSED:
                raise NotMovable(f"there is no request {id}")
            if (reason := why_not_movable(entry)) is not None:
                raise not_movable(entry, reason)
            found.append(entry)
        return found

    def record(self, entry: Entry) -> Movable:
        """Return a request as bytes, with what goes beside them. Raises NotMovable if it can't move now."""
        return save(entry, boot())

    def save(self, ids: Iterable[int] | None) -> list[bytes]:
        """Do what `RequestTable.save` describes."""
        return self._in_loop(lambda: self._save(ids))

    def restore(self, records: Iterable[bytes], sockets: Iterable[Any]) -> list[int]:
        """Do what `RequestTable.restore` describes."""
        return self._in_loop(lambda: self._restore(records, sockets))

    def _in_loop(self, function: Callable[[], _T]) -> _T:
        """Return what `function` returns. If another thread runs the loop, have the loop call it, and wait."""
        steps = self._steps
        called: Future[_T] = Future()

        def call() -> None:
            if called.set_running_or_notify_cancel():
                try:
                    called.set_result(function())
                except BaseException as error:
                    called.set_exception(error)
                    if not isinstance(error, Exception):
                        raise  # it ends the loop, too

        if steps.in_other_thread:
            steps.post(call)
            while not called.done() and steps.in_other_thread:
                wait([called], _LOOK_S)
            if not called.cancel():
                return called.result()
        # No other thread runs the loop, or it has ended before it came to this.
        if not steps.running:
            steps.table.now = steps.table.clock()  # its last pass may be long ago
        return function()

    def _save(self, ids: Iterable[int] | None) -> list[bytes]:
        found = []
        for entry in self.movable(ids):
            with contextlib.suppress(*(() if ids is not None else (NotMovable,))):
                found.append(self.record(entry).record)
        return found

    def _restore(self, records: Iterable[bytes], sockets: Iterable[Any]) -> list[int]:
        if self._steps.table.running is not None:
            raise ReqtableError("a step can't call restore(): have the loop call it, by engine.post()")
        heads = [head_of(each) for each in records]
        left = list(sockets)
        wanted = sum(head.attachments for head in heads)
        if wanted != len(left):
            raise ReqtableError(f"these records need {wanted} sockets and files, but {len(left)} are given")
        for head in heads:
            self.rehearse(head)
        entries: list[Entry] = []
        files: list[int] = []
        try:
            for head in heads:
                own, left = left[: head.attachments], left[head.attachments :]
                entries.append(self.resume(head, own))
                files += own[len(own) - len(head.files) :]
        except BaseException:
            for entry in entries:
                self._intake.give_back(entry)
            self._reap()
            raise
        for each in files:
            os.close(each)
        for entry in entries:
            self.freezer.thaw(entry)
        self._reap()
        return [entry.id for entry in entries]

    def _reap(self) -> None:
        if not self._steps.running:
            self._steps.reap()

    def rehearse(self, head: Head) -> None:
        """Find out whether the code of this process can go on with a request. Raises ReqtableError if it can't."""
        read(head, unwrapped(self.server_of(head).RequestHandlerClass), self._steps.table.now)

    def resume(self, head: Head, attached: Sequence[Any]) -> Entry:
        """Enter a request of another process, with its sockets and files. It is MOVING until it is thawed.

        Raises ReqtableError if the record can't be used; then the sockets are the caller's. The descriptors of files
        are the caller's in any case.
        """
        now = self._steps.table.now
        made_at = min(head.time, now) if has_same_clock(head) else now
        return self._intake.resume(self.server_of(head), head, attached, made_at)

    def server_of(self, head: Head) -> Hosted:
        """Return the server that goes on with a request: the one at the same address, or else the only one."""
        server = server_at(self._servers, head.server)
        if server is None:
            raise ReqtableError(f"no server is at {head.server}, where request {head.id} of {head.handler} came from")
        if (head.control is None) is (getattr(server, "socket_type", None) == socket.SOCK_DGRAM):
            came = "on a stream" if head.control is None else "as datagrams"
            raise ReqtableError(f"request {head.id} came {came}, but {address_text(server.server_address)} has others")
        policy = server._policies.chosen
        if policy.takes_whole_requests:
            raise ReqtableError(
                f"request {head.id} can't go on under policy {policy.name!r}, which takes whole requests"
            )
        handler = unwrapped(server.RequestHandlerClass)
        if not (is_resumable(handler) and issubclass(handler, StateRequestHandler)):
            raise ReqtableError(
                f"{handler_name(handler)} is no state machine, but request {head.id} was one of {head.handler}"
            )
        return server


@lru_cache(maxsize=1)
def boot() -> str:
    """Return what names this start of the machine, or "": clocks of one start can be compared."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def has_same_clock(head: Head) -> bool:
    """Return whether the time of a record can be compared with times here: both are of one start of the machine."""
    return bool(head.boot) and head.boot == boot()
