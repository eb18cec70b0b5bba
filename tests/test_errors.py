"""The errors form the tree that their module's docstring shows, and can be pickled. `Limits` names a wrong field."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from dataclasses import FrozenInstanceError, fields
from math import inf, nan

import pytest

from reqtable.net.sockets import is_peers_doing
from reqtable.table import errors
from reqtable.table.errors import (
    ConfigurationError,
    ConnectFailed,
    HandlerError,
    IncompleteRead,
    InvalidTransition,
    LimitExceeded,
    NotMovable,
    PeerError,
    ReqtableError,
    SendFileError,
    TimedOut,
    ending_of,
)
from reqtable.table.limits import Limits
from reqtable.table.states import Ending

ERRORS = [
    ReqtableError("broken"),
    ConfigurationError("no such policy", 78),
    HandlerError("a rule"),
    InvalidTransition("not a want"),
    SendFileError("the file ended 5 bytes early"),
    NotMovable("a file is half sent"),
    ConnectFailed("tcp://192.0.2.1:80", "connection refused"),
    PeerError("gone"),
    LimitExceeded("line(limit=5)", 5),
    IncompleteRead("exactly(n=4)", b"ab"),
    TimedOut("line(limit=5) did not come within 3 s"),
]


def printed_tree() -> dict[str, str | None]:
    """Return each error in the docstring's tree, with its parent."""
    parents: dict[str, str | None] = {}
    path: list[str] = []
    for row in errors.__doc__.splitlines():
        found = re.match(r"^([│├└─ ]*)([A-Z]\w+)( {2,}\S|$)", row)
        if found and (found[1] or not path):
            depth = len(found[1]) // 4
            path[depth:] = [found[2]]
            parents[found[2]] = path[depth - 1] if depth else None
    return parents


def test_the_printed_tree_is_the_real_one():
    real = {
        name: each.__bases__[0].__name__ if each is not ReqtableError else None
        for name, each in vars(errors).items()
        if inspect.isclass(each) and issubclass(each, Exception)
    }
    assert printed_tree() == real
    assert len(real) == len(ERRORS)
    assert issubclass(IncompleteRead, EOFError)
    assert issubclass(TimedOut, TimeoutError)
    for error in ERRORS:
        assert type(error).__doc__
        assert isinstance(error, ReqtableError)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_can_be_sent_to_another_process(error):
    copies = [pickle.loads(pickle.dumps(error, protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)]
    for each in [*copies, copy.copy(error), copy.deepcopy(error)]:
        assert type(each) is type(error)
        assert (each.args, str(each), vars(each)) == (error.args, str(error), vars(error))


def test_errors_say_what_happened():
    error = LimitExceeded("untaken output", 64)
    assert (str(error), error.what, error.limit) == (
        "untaken output exceeds its limit of 64 bytes",
        "untaken output",
        64,
    )
    error = IncompleteRead("exactly(n=4)", b"ab")
    assert (str(error), error.waited_for, error.partial) == (
        "end of file after 2 bytes while waiting for exactly(n=4)",
        "exactly(n=4)",
        b"ab",
    )
    assert str(TimedOut("too late")) == "too late"


def accepted(values: tuple[object, ...], names: list[str]) -> list[tuple[str, object]]:
    """Return the accepted values. Checks that the others raise a ValueError that names the field and the value."""
    taken = []
    for name in names:
        for value in values:
            try:
                assert getattr(Limits(**{name: value}), name) == value or value != value
                taken.append((name, value))
            except ValueError as error:
                assert str(error).startswith(f"{name} must be ")
                assert repr(value) in str(error)
    return taken


NAMES = [field.name for field in fields(Limits) if field.name != "when_full"]
SECONDS = [name for name in NAMES if name.endswith("_s")]
COUNTS = [name for name in NAMES if not name.endswith("_s")]


def test_limits_take_only_what_is_above_0():
    assert accepted((0, -1, -0.5, True, "64", b"1", 1j), NAMES) == []
    unbounded = [
        "entries_per_peer_max",
        "accepts_per_s_max",
        "buffered_bytes_max",
        "idle_timeout_s",
        "keepalive_s",
        "request_timeout_s",
    ]
    assert accepted((None,), NAMES) == [(name, None) for name in unbounded], "what may have no bound"
    assert accepted((1, 7), NAMES) == [(name, value) for name in NAMES for value in (1, 7)]
    assert accepted((nan,), NAMES) == [], "not a number is not above 0"


def test_what_becomes_of_those_who_come_when_there_is_no_room_is_one_of_three():
    for value in ("wait", "reject", "evict"):
        assert Limits(when_full=value).when_full == value
    with pytest.raises(ValueError, match="when_full must be one of wait, reject, evict, not 'drop'"):
        Limits(when_full="drop")


def test_seconds_may_be_fractions_and_counts_may_not():
    assert accepted((0.5, 2.5), SECONDS) == [(name, value) for name in SECONDS for value in (0.5, 2.5)]
    assert accepted((inf,), SECONDS) == [(name, inf) for name in SECONDS if name != "keepalive_s"], (
        "the kernel counts it"
    )
    assert accepted((0.5, 2.5, inf), COUNTS) == []


def test_limits_are_values():
    assert len(COUNTS) == 18
    assert len(SECONDS) == 14
    assert Limits() == Limits()
    assert Limits(recv_bytes=1) != Limits()
    with pytest.raises(FrozenInstanceError):
        Limits().recv_bytes = 1
    with pytest.raises(TypeError, match="no_such_max"):
        Limits(no_such_max=1)
    assert pickle.loads(pickle.dumps(Limits(recv_bytes=9))) == Limits(recv_bytes=9)


RESET, BROKEN, LATE, OURS = ConnectionResetError("gone"), BrokenPipeError("gone"), TimedOut("late"), ValueError("ours")


@pytest.mark.parametrize(
    ("problem", "ending", "peers"),
    [
        (ExceptionGroup("all", [RESET, BROKEN]), "reset", True),
        (ExceptionGroup("all", [ExceptionGroup("nested", [RESET]), BROKEN]), "reset", True),
        (ExceptionGroup("all", [LATE, ExceptionGroup("nested", [LATE])]), "timeout", True),
        (ExceptionGroup("all", [LATE, RESET]), "reset", True),
        (ExceptionGroup("mixed", [RESET, OURS]), "error", False),
        (ExceptionGroup("mixed", [RESET, ExceptionGroup("nested", [BROKEN, OURS])]), "error", False),
        (BaseExceptionGroup("mixed", [RESET, SystemExit(1)]), "error", False),
        (ExceptionGroup("ours", [OURS]), "error", False),
    ],
)
def test_a_group_is_the_peers_doing_if_all_of_it_is(problem: BaseException, ending: str, peers: bool) -> None:
    assert ending_of(problem).value == ending
    assert is_peers_doing(problem) == peers


def test_a_cause_does_not_make_an_error_the_peers_doing() -> None:
    error = OURS.with_traceback(None)
    error.__cause__ = RESET
    assert ending_of(error) is Ending.ERROR
    assert not is_peers_doing(error)
