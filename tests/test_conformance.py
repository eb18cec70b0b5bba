"""The same handler gives the same bytes under every policy that accepts it: {style} × {policy} × {transport}."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.stopwatch import Stopwatch
from reqtable import ConfigurationError
from reqtable.dispatch import policy_named, policy_names
from tests import conformance
from tests.conformance import (
    DATAGRAM_DIALOGUES,
    HANDLERS,
    POLICIES,
    STREAM_DIALOGUES,
    STREAMS,
    STYLES,
    TRANSPORTS,
)
from tests.support import Client, served, slow_but
from tests.talk import StateTalk

CELLS = [
    (policy, style, transport, dialogue)
    for policy in POLICIES
    for style in STYLES
    for transport in TRANSPORTS
    for dialogue in (STREAM_DIALOGUES if transport in STREAMS else DATAGRAM_DIALOGUES)
    if conformance.applies(style, transport, dialogue)
    and (policy != "executor" or style == "state")
    # a child forked while the client's thread is in OpenSSL may wait for its locks for ever; see test_tls
    and not (policy == "fork" and transport == "tls")
    # a blocking handler under inline keeps the loop to itself: nobody could cancel it
    and not (policy == "inline" and style == "blocking" and dialogue == "cancel")
]


def test_every_policy_of_ours_is_tried() -> None:
    ours = [name for name in policy_names() if policy_named(name).__module__.startswith("reqtable.")]
    assert sorted(POLICIES) == ours


def is_quick(policy: str, style: str, transport: str, dialogue: str) -> bool:
    """Where a request runs elsewhere, UNIX sockets have one dialogue. Under `executor` each cell starts a process."""
    if policy == "executor":
        return transport in ("tcp", "udp")
    return policy in ("inline", "greenlet") or transport in ("tcp", "tls", "udp") or dialogue == "echo"


@pytest.mark.parametrize(
    ("policy", "style", "transport", "dialogue"), slow_but(CELLS, *(cell for cell in CELLS if is_quick(*cell)))
)
def test_the_same_dialogue_gives_the_same_bytes(
    policy: str, style: str, transport: str, dialogue: str, tmp_path: Path
) -> None:
    conformance.check(policy, style, transport, dialogue, tmp_path)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("style", ["async", "blocking"])
def test_executor_refuses_what_is_not_data(style: str, transport: str, tmp_path: Path) -> None:
    handler = HANDLERS[style, "stream" if transport in STREAMS else "datagram"]
    with pytest.raises(ConfigurationError, match="only a StateRequestHandler is data"):
        conformance.server_of(handler, transport, tmp_path, "executor")
    assert not (tmp_path / "server").exists(), "nothing was bound"


# -- a policy from outside the package --------------------------------------------------------------------------------

INLINE_CELLS = [cell[1:] for cell in CELLS if cell[0] == "inline"]


@pytest.fixture
def stopwatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Register the example policy as an installed package would."""
    information = tmp_path / "stopwatch-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: stopwatch\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[reqtable.dispatch]\nstopwatch = examples.stopwatch:Stopwatch\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "stopwatch"


@pytest.mark.parametrize(
    ("style", "transport", "dialogue"),
    slow_but(INLINE_CELLS, *(cell for cell in INLINE_CELLS if cell[1] in ("tcp", "udp"))),
)
def test_a_policy_of_ones_own_passes_the_inline_cells(
    stopwatch: str, style: str, transport: str, dialogue: str, tmp_path: Path
) -> None:
    conformance.check(stopwatch, style, transport, dialogue, tmp_path)


def test_a_policy_of_ones_own_is_known_by_its_entry_point(
    stopwatch: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert "stopwatch" in policy_names()
    assert policy_named("stopwatch") is Stopwatch
    monkeypatch.setattr("examples.stopwatch.SLOW_S", 0.0)
    with served(StateTalk, "stopwatch") as server, Client(server.server_address) as client:
        assert client.ask(b"slow\n") == b"slow\n"
        assert [row["policy"] for row in server.table.snapshot()] == ["stopwatch"]
    assert "held the loop for" in caplog.text
