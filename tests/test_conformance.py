"""The same handler gives the same bytes under every policy that takes it: {style} × {policy} × {transport}."""

from __future__ import annotations

from pathlib import Path

import pytest

from reqtable import ConfigurationError
from tests import conformance
from tests.conformance import DATAGRAM_DIALOGUES, HANDLERS, POLICIES, STREAM_DIALOGUES, STYLES, TRANSPORTS

CELLS = [
    (policy, style, transport, dialogue)
    for policy in POLICIES
    for style in STYLES
    for transport in TRANSPORTS
    for dialogue in (STREAM_DIALOGUES if transport in ("tcp", "unix") else DATAGRAM_DIALOGUES)
    if conformance.applies(style, transport, dialogue)
    and (policy != "executor" or style == "state")
    # a blocking handler under inline keeps the loop to itself: nobody could cancel it
    and not (policy == "inline" and style == "blocking" and dialogue == "cancel")
]


@pytest.mark.parametrize(("policy", "style", "transport", "dialogue"), CELLS)
def test_the_same_dialogue_gives_the_same_bytes(
    policy: str, style: str, transport: str, dialogue: str, tmp_path: Path
) -> None:
    conformance.check(policy, style, transport, dialogue, tmp_path)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("style", ["async", "blocking"])
def test_executor_refuses_what_is_not_data(style: str, transport: str, tmp_path: Path) -> None:
    handler = HANDLERS[style, "stream" if transport in ("tcp", "unix") else "datagram"]
    with pytest.raises(ConfigurationError, match="only a StateRequestHandler is data"):
        conformance.server_of(handler, transport, tmp_path, "executor")
    assert list(tmp_path.iterdir()) == [], "nothing was bound"
