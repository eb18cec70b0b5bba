"""A resumable state machine that keeps data from step to step.

`put N`, then N bytes, stores a note. `count` answers how many words the notes of this connection have. `rank` does slow
work outside the loop. `bye` ends the connection. Anything else is answered with a list of the commands.

    reqtable serve examples/notes.py:Notes
    reqtable states examples/notes.py:Notes
"""

from reqtable import StateRequestHandler, Transition, call, exactly, line, state


def slow_rank(words: int) -> int:
    """Do slow work, which must not hold up the loop."""
    return sum(divmod(words * words, 97))


class Notes(StateRequestHandler):
    """Answers put N\\n<N bytes>, which stores a note, and count\\n, which asks for the number of words in the notes."""

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
            return None  # done: the output is flushed, then the connection is closed
        self.send(b"%d\n" % self.words if verb == b"count" else b"put N, count, rank or bye?\n")
        return self.command  # next state, with the want it declares

    @state(timeout=60)  # no want here: the transition to this state names it
    def body(self, note: bytes) -> Transition:
        """Take the note."""
        self.words += len(note.split())
        return self.command

    @state()
    def ranked(self, rank: int) -> Transition:
        """The slow work is done."""
        self.send(b"rank %d\n" % rank)
        return self.command
