"""A resumable state machine with data of its own.

`put N`, then N bytes, stores a note; `count` answers how many words the notes of this connection have; `rank` does slow
work elsewhere; `bye` ends. Anything else is answered with what there is.

    reqtable serve examples/notes.py:Notes
    reqtable states examples/notes.py:Notes
"""

from reqtable import StateRequestHandler, Transition, call, exactly, line, state


def slow_rank(words: int) -> int:
    """Work that must not hold up the loop."""
    return sum(divmod(words * words, 97))


class Notes(StateRequestHandler):
    """put N\\n<N bytes> stores a note; count\\n answers how many words this connection's notes have."""

    words: int = 0  # declared fields are the request's data

    @state(line(limit=512), timeout=30)
    def command(self, text: bytes) -> Transition:
        """Read a command."""
        verb, _, rest = text.strip().partition(b" ")
        if verb == b"put" and rest.isdigit():
            return self.body, exactly(int(rest))  # next state, and what it waits for
        if verb == b"rank":
            return self.ranked, call(slow_rank, self.words)
        if verb == b"bye":
            return None  # done: what was sent is flushed, then closed
        self.send(b"%d\n" % self.words if verb == b"count" else b"put N, count, rank or bye?\n")
        return self.command  # next state, with the want it declares

    @state(timeout=60)  # the transition said what it waits for
    def body(self, note: bytes) -> Transition:
        """Take the note."""
        self.words += len(note.split())
        return self.command

    @state()
    def ranked(self, rank: int) -> Transition:
        """The slow work is done."""
        self.send(b"rank %d\n" % rank)
        return self.command
