"""Goes through rows that may come and go meanwhile, without a look at all of them before the first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

SLICE_ROWS = 250  # listing these takes half a millisecond


def gradually(rows: Mapping[int, Any], last_id: int) -> Iterator[int]:
    """Yield the ids of rows, up to `last_id`, in their order. The rows may come and go in between, in any thread.

    The ids are copied, because a dict must not change during an iteration: the first ones at first, the others if they
    are asked for. So the oldest rows of a million cost no more than those of a hundred.
    """
    first = list(islice(rows, SLICE_ROWS))  # one call into C: no other thread can run in between
    yield from first
    if len(first) == SLICE_ROWS:
        known = set(first)
        yield from (id for id in list(rows) if id <= last_id and id not in known)
