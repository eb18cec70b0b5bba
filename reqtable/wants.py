"""Everything that the author of a want needs. Import this module, and no other.

A want is an immutable object that a request waits for. Derive a class from `Want`, put `@want_type` before it, and give
it `take(self, entry)`:

* it returns the item, taken from `entry.input`, or `MISSING` if the item has not come;
* it never waits, and takes no part of an item;
* it raises `LimitExceeded` if the item exceeds the want's limit: then `on_limit` of the handler is called;
* it raises a `PeerError` if the input can't be such an item: that ends the request, with one line in the log.

`entry.input` has `through(separator, limit)`, `exactly(count)`, `chunk(limit)` and `rest(limit)`, each of which gives
bytes or `MISSING`. `len(entry.input)` is how many bytes are unread; `entry.input.peek(count)` shows the first of them.
`examples/netstrings.py` is a want of a program's own.
"""

from reqtable.table.errors import IncompleteRead, LimitExceeded, PeerError
from reqtable.table.input import MISSING, Input, Missing
from reqtable.table.output import Output
from reqtable.table.states import Event
from reqtable.table.want import Waiting, Want, want_type

__all__ = [
    "MISSING",
    "Event",
    "IncompleteRead",
    "Input",
    "LimitExceeded",
    "Missing",
    "Output",
    "PeerError",
    "Waiting",
    "Want",
    "want_type",
]
