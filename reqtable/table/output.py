"""The output of one request: what the handler has sent, and the kernel has not taken. Pure: bytes in, bytes out."""

from __future__ import annotations

from typing import Any, BinaryIO

from reqtable.table.errors import SendFileError

# The most that is joined from small pieces for one send, and the most that is read from a file at once.
CHUNK_BYTES = 262_144
SMALL_BYTES = 16_384  # this much may be sent even if the pass has sent enough


class FileSlice:
    """Describes the part of a file that is still to be sent: `remaining` bytes of `file` from `offset`."""

    __slots__ = ("file", "kernel_refuses", "offset", "remaining")

    def __init__(self, file: BinaryIO, offset: int, remaining: int) -> None:
        self.file = file
        self.offset = offset
        self.remaining = remaining
        self.kernel_refuses = False  # sendfile(2) can't send this file: the engine reads it instead

    def descriptor(self) -> int:
        """Return the file's descriptor for sendfile(2), or -1 if it has none or the kernel has refused it."""
        if not self.kernel_refuses:
            try:
                return self.file.fileno()
            except Exception:  # no descriptor, or a closed file: reading it will tell which
                self.kernel_refuses = True
        return -1

    def read(self, most: int = CHUNK_BYTES) -> bytes:
        """Read the next bytes, at most `most`, of a file that the kernel can't send. Raises SendFileError."""
        count = min(self.remaining, most)
        file: Any = self.file  # the user's object: its methods may return anything
        try:
            file.seek(self.offset)
            data = file.read(count)
        except Exception as error:
            raise SendFileError(f"{self._what()} can't be read: {type(error).__name__}: {error}") from error
        if not isinstance(data, bytes | bytearray | memoryview) or len(data) > count:
            raise SendFileError(
                f"{self._what()}: read({count}) returned {type(data).__name__}, not {count} bytes or less"
            )
        if not data:
            raise self.ended()
        return bytes(data)

    def ended(self) -> SendFileError:
        """Return the error for a file that ended before all of it was sent."""
        return SendFileError(f"{self._what()} ended {self.remaining} bytes early, at offset {self.offset}")

    def _what(self) -> str:
        try:
            return f"the file {self.file.name!r} that is being sent"
        except Exception:  # it has no name, or fails to tell it
            return f"the {type(self.file).__name__} that is being sent"


class EndOfOutput:
    """Stands at the end of the output: the peer is to see end of file. It counts as one byte that is not in memory."""

    __slots__ = ()


END = EndOfOutput()


class Output:
    """Holds the unsent output of a request: pieces in order, each `bytes`, a `FileSlice` or, at the end, `END`.

    `first` is the piece to send next, or None. `more` is the list of the other pieces, or, most often, None.
    `size` counts all bytes. `held` counts only the bytes in memory, to which the limits apply. A datagram may have no
    bytes, so `first`, not `size`, tells whether there is anything to send. A handler's `send` writes a lone first piece
    itself, and `Stream.flush` takes one away.
    """

    __slots__ = ("first", "held", "more", "size")

    def __init__(self) -> None:
        self.first: Any = None
        self.more: list[Any] | None = None
        self.size = 0
        self.held = 0

    @property
    def pieces(self) -> list[Any]:
        """All pieces, in order."""
        return [] if self.first is None else [self.first, *(self.more or ())]

    def append(self, data: bytes) -> None:
        """Add a piece of bytes."""
        if self.more is not None:  # fast path of _add
            self.more.append(data)
        else:
            self._add(data)
        self.size += len(data)
        self.held += len(data)

    def append_file(self, piece: FileSlice) -> None:
        """Add a part of a file."""
        self._add(piece)
        self.size += piece.remaining

    def append_end(self) -> None:
        """End the output after what is queued."""
        self._add(END)
        self.size += 1

    def extend(self, other: Output) -> None:
        """Move all pieces of `other` to the end of this output."""
        for piece in other.pieces:
            self._add(piece)
        self.size += other.size
        self.held += other.held
        other.clear()

    def front(self) -> Any:
        """Return the first piece. Small pieces in a row are joined into one first, so that they cost one send."""
        others = self.more
        if others is not None and type(self.first) is bytes:
            if self.held == self.size <= CHUNK_BYTES:
                count = len(others)
            else:  # a file is among the pieces, or they are too much for one send
                count, total = 0, len(self.first)
                for piece in others:
                    if type(piece) is not bytes or total + len(piece) > CHUNK_BYTES:
                        break
                    total += len(piece)
                    count += 1
            if count:
                self.first = b"".join([self.first, *others[:count]])
                self._drop(count)
        return self.first

    def consume(self, count: int) -> None:
        """Drop `count` bytes from the first piece: the kernel has taken them."""
        first = self.first
        self.size -= count
        if type(first) is FileSlice:
            first.offset += count
            first.remaining -= count
            is_sent = not first.remaining
        elif first is END:
            is_sent = True
        else:
            self.held -= count
            is_sent = count == len(first)
            if not is_sent:
                # A view: a 10 MB answer that is sent in small parts is not copied for each of them.
                self.first = memoryview(first)[count:]
        if is_sent:
            self.first = None
            if self.more is not None:
                self.first = self.more[0]
                self._drop(1)

    def clear(self) -> None:
        """Drop all pieces."""
        self.first = self.more = None
        self.size = self.held = 0

    def _add(self, piece: Any) -> None:
        if self.first is None:
            self.first = piece
        elif self.more is None:
            self.more = [piece]
        else:
            self.more.append(piece)

    def _drop(self, count: int) -> None:
        """Drop the first `count` pieces of `more`."""
        assert self.more is not None
        del self.more[:count]
        if not self.more:
            self.more = None
