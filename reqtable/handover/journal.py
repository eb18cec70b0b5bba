"""The journal of a worker: what a successor needs to continue its requests, in memory that outlives the worker.

Each row has a record, in one of two blocks. A new record goes into the other block. So whenever the process dies, one
of the two is whole. `commit` makes all records that were written since the last commit valid at once, by one store.

Beside the records there is one page for the row that the loop works on now: what it has received and sends. Most steps
change nothing else of their row. Then the page is all that is written.

The memory is a file without a name (memfd_create(2)). It grows by segments: a segment has blocks of one size. The
process that has died wrote it, and no other: nothing in it comes from the network unchecked but the bytes of requests.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple
from zlib import crc32

# The places of the numbers in the head.
_COMMITTED, _HOLDER, _RUNNING, PHASE, ROW, OPENED_AT, RECEIVED, SENT, OUTPUT_SIZE, INPUT_MAX = range(10)
INPUT_COUNT, IN_DOUBT = 10, 11  # only for connections whose bytes the kernel does not count
_HEAD: Final = 4096
INPUT_AT: Final = _HEAD  # where the input of the page is
OUTPUT_MAX: Final = 16_384  # of the page: longer output is part of a record

# The phases of the page.
IDLE, OPEN, DONE = 0, 1, 2  # OPEN: its steps run; DONE: they are done, and their output is in the page

_BLOCK: Final = struct.Struct("<QQQIIQQQ")  # commit, row, cookie, checksum, size, received, sent, reached
_REACHED: Final = struct.Struct("<Q")
_SEGMENT: Final = struct.Struct("<QQ")  # size and number of its blocks
_SEGMENT_PAD: Final = _HEAD  # a whole page for its head, so that large blocks begin at pages
_SEGMENT_BYTES: Final = 2**20
_SMALLEST: Final = 256
_STEP: Final = 4  # each size of blocks is so many times the one before
_GIVEN_BACK: Final = 2**20  # blocks of this size give their memory back when they are free
_NOTHING: Final = bytes(8)
_LOW: Final = 0xFFFF_FFFF

_write_head = _BLOCK.pack_into


class Block(NamedTuple):
    """Says where in the memory a record may be."""

    memory: mmap.mmap
    at: int
    size: int


class Found(NamedTuple):
    """Is a record that was read: how much was received and sent when it was written, and its contents.

    `reached` is how much was sent in the end, if the kernel does not count that.
    """

    commit: int
    received: int
    sent: int
    payload: bytes
    reached: int = 0


class Slot:
    """Holds the place of one row in a journal."""

    __slots__ = ("cookie", "current", "id", "spare")

    def __init__(self, id: int, cookie: int, current: Block | None = None) -> None:
        self.id = id
        self.cookie = cookie
        self.current = current
        self.spare: Block | None = None


class Page(NamedTuple):
    """Is what the page said when its process died."""

    phase: int
    row: int
    opened_at: int  # the number of the last commit before
    received: int
    sent: int
    input: bytes  # at its beginning is what was received, if anything was
    output: bytes


class Journal:
    """Writes the records of one process, or reads those of the process before it. `fd` is the file of its memory."""

    def __init__(self, fd: int, input_max: int = 65_536) -> None:
        self.fd = fd
        former_max = int.from_bytes(os.pread(fd, 8, 8 * INPUT_MAX), "little")  # 0: no process has come to store it
        input_max = former_max or input_max
        self.output_at = INPUT_AT + _rounded(input_max)
        self._end = self.output_at + OUTPUT_MAX  # of the mapped memory
        if not former_max:
            os.ftruncate(fd, self._end)
        self.memory = mmap.mmap(fd, self._end)
        whole = memoryview(self.memory)
        self.numbers = whole[:_HEAD].cast("Q")
        self.input = whole[INPUT_AT : INPUT_AT + input_max]
        self.commits: int = self.numbers[_COMMITTED]
        self.open_row: int | None = None  # the row whose page is open, in this process
        self._free: dict[int, list[Block]] = {}
        self._segments: list[mmap.mmap] = []
        if former_max:
            self._map_segments(os.fstat(fd).st_size)
        else:
            self.numbers[INPUT_MAX] = input_max

    # -- one row ------------------------------------------------------------------------------------------------------

    def open(self, row: int, received: int, sent: int) -> None:
        """Begin the page of a row: from here on its input is received into `input`."""
        numbers = self.numbers
        numbers[PHASE] = IDLE  # first: what is half written says nothing
        numbers[ROW] = row
        numbers[OPENED_AT] = self.commits
        numbers[RECEIVED] = received
        numbers[SENT] = sent
        numbers[PHASE] = OPEN
        self.open_row = row

    def close(self, output: bytes | None) -> None:
        """Note that the steps of the page's row are done: they have read all input, and send `output`."""
        numbers = self.numbers
        if output is None:
            numbers[OUTPUT_SIZE] = 0
        else:
            size = len(output)
            at = self.output_at
            self.memory[at : at + size] = output
            numbers[OUTPUT_SIZE] = size
        numbers[PHASE] = DONE
        self.open_row = None

    def run(self, row: int) -> None:
        """Note that a step of a row runs that has received nothing; 0: none does. The page is over."""
        numbers = self.numbers
        numbers[PHASE] = IDLE
        numbers[_RUNNING] = row
        self.open_row = None

    def write(self, slot: Slot, payload: bytes, received: int, sent: int) -> None:
        """Write a record, which is valid from the next `commit` on. Once for a row and a commit."""
        need = _BLOCK.size + len(payload)
        block = slot.spare
        if block is None or block.size < need:
            self._give_back(block)
            slot.spare = block = self._block(need)
        memory, at, _ = block
        commit = self.commits + 1
        size = len(payload)
        check = crc32(payload, commit & _LOW)
        _write_head(memory, at, commit, slot.id, slot.cookie, check, size, received, sent, sent)
        at += _BLOCK.size
        memory[at : at + size] = payload
        slot.current, slot.spare = block, slot.current

    def reach(self, slot: Slot, sent: int) -> None:
        """Note how much was sent of what the record has, for a connection whose bytes the kernel does not count."""
        if slot.current is not None:
            memory, at, _ = slot.current
            _REACHED.pack_into(memory, at + _BLOCK.size - _REACHED.size, sent)

    def commit(self) -> None:
        """Make the records valid that were written since the last commit."""
        self.commits += 1
        numbers = self.numbers
        numbers[_COMMITTED] = self.commits
        numbers[_RUNNING] = 0
        self.open_row = None

    def free(self, slot: Slot) -> None:
        """Drop the record of a row, whose connection is closed."""
        for block in (slot.spare, slot.current):  # in this order: the older record must not become valid again
            self._give_back(block)
        slot.spare = slot.current = None
        if self.open_row == slot.id:
            self.open_row = None

    # -- for a successor ----------------------------------------------------------------------------------------------

    def page(self) -> Page:
        """Return what the page says. It says nothing of a row that has a later record than its opening."""
        numbers = self.numbers
        phase, row, opened_at, received, sent = (numbers[each] for each in (PHASE, ROW, OPENED_AT, RECEIVED, SENT))
        output = bytes(self.memory[self.output_at : self.output_at + min(numbers[OUTPUT_SIZE], OUTPUT_MAX)])
        return Page(phase, row, opened_at, received, sent, bytes(self.input), output if phase == DONE else b"")

    @property
    def running(self) -> int:
        """The id of the row whose step ran when the process died, unless the page tells that; 0: none did."""
        numbers = self.numbers
        running = int(numbers[_RUNNING])
        return 0 if numbers[PHASE] == DONE and numbers[ROW] == running else running

    def read(self) -> list[tuple[Slot, Found]]:
        """Return the valid record of each row. Drops all other blocks, also those that were half written."""
        best: dict[int, tuple[Slot, Found]] = {}
        for block in self._blocks():
            memory, at, size = block
            if memory[at : at + 8] == _NOTHING:
                self._free.setdefault(size, []).append(block)
                continue
            slot, found = _read(block, self.commits)
            worse: Block | None = block
            if slot is not None and found is not None:
                before = best.get(slot.id)
                if before is None or before[1].commit < found.commit:
                    best[slot.id] = slot, found
                    worse = None if before is None else before[0].current
            self._give_back(worse)
        return list(best.values())

    @property
    def holder(self) -> int:
        """The number of the worker that has the descriptors of all rows."""
        return int(self.numbers[_HOLDER])

    @holder.setter
    def holder(self, worker: int) -> None:
        self.numbers[_HOLDER] = worker

    # -- memory -------------------------------------------------------------------------------------------------------

    def _block(self, need: int) -> Block:
        size = _SMALLEST
        while size < need:
            size *= _STEP
        free = self._free.setdefault(size, [])
        if not free:
            self._grow(size)
        return free.pop()

    def _give_back(self, block: Block | None) -> None:
        if block is None:
            return
        block.memory[block.at : block.at + _BLOCK.size] = bytes(_BLOCK.size)
        if block.size >= _GIVEN_BACK:
            block.memory.madvise(mmap.MADV_REMOVE, block.at, block.size)
        self._free.setdefault(block.size, []).append(block)

    def _grow(self, size: int) -> None:
        """Add a segment with blocks of `size` bytes: a larger one each time, for each takes a descriptor."""
        count = max(1, max(_SEGMENT_BYTES, self._end // 2) // size)
        length = _rounded(_SEGMENT_PAD + count * size)
        os.ftruncate(self.fd, self._end + length)
        memory = mmap.mmap(self.fd, length, offset=self._end)
        _SEGMENT.pack_into(memory, 0, size, count)
        self._end += length
        self._segments.append(memory)
        self._free.setdefault(size, []).extend(_blocks_of(memory))

    def _map_segments(self, total: int) -> None:
        """Map what a process before this one has added. A segment without a head was being added when it died."""
        while self._end < total:
            size, count = _SEGMENT.unpack(os.pread(self.fd, _SEGMENT.size, self._end))
            if not size:
                os.ftruncate(self.fd, self._end)
                return
            length = _rounded(_SEGMENT_PAD + count * size)
            self._segments.append(mmap.mmap(self.fd, length, offset=self._end))
            self._end += length

    def _blocks(self) -> Iterator[Block]:
        for memory in self._segments:
            yield from _blocks_of(memory)


def new_memory() -> int:
    """Return the descriptor of new memory for a journal. It is closed on exec."""
    return os.memfd_create("reqtable journal", os.MFD_CLOEXEC)


def holder_of(fd: int) -> int:
    """Return the `holder` of the journal in the memory `fd`, without mapping it."""
    return int.from_bytes(os.pread(fd, 8, 8 * _HOLDER), "little")


def _read(block: Block, commits: int) -> tuple[Slot | None, Found | None]:
    """Return the record in a block; a pair of None if it has none that is whole and valid."""
    memory, at, room = block
    commit, row, cookie, check, size, received, sent, reached = _BLOCK.unpack_from(memory, at)
    at += _BLOCK.size
    if not 0 < commit <= commits or size > room - _BLOCK.size:
        return None, None
    payload = memory[at : at + size]
    if crc32(payload, commit & _LOW) != check:
        return None, None
    return Slot(row, cookie, block), Found(commit, received, sent, payload, reached)


def _blocks_of(memory: mmap.mmap) -> Iterator[Block]:
    size, count = _SEGMENT.unpack_from(memory, 0)
    return (Block(memory, _SEGMENT_PAD + each * size, size) for each in range(count))


def _rounded(size: int) -> int:
    unit = max(_HEAD, mmap.ALLOCATIONGRANULARITY)
    return -(-size // unit) * unit
