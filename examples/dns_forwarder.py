"""A DNS forwarder (RFC 1035): asks one resolver over UDP, and keeps each answer for as long as the answer says.

    DNS_UPSTREAM=udp://192.0.2.53:53 reqtable serve examples/dns_forwarder.py:Dns --bind udp://127.0.0.1:5300
    dig @127.0.0.1 -p 5300 example.org

A query that is not answered is sent again. Each query leaves from a port of its own with a random id, and an answer
must come back to that port with that id and that question. So somebody who can't see the query can hardly forge an
answer (RFC 5452).

Queries are spoken afresh, not copied: options of EDNS (RFC 6891) concern two neighbours, so a client's cookie, say,
does not reach the resolver. There is no TCP listener. An answer that is too long for a datagram has its TC bit set, as
the resolver or this forwarder has cut it: a client that needs the whole answer asks the resolver over TCP.
"""

import os
import secrets
import struct
from dataclasses import dataclass
from typing import Any, ClassVar

from reqtable import Arrived, Connection, StateRequestHandler, Transition, connect, either, rest, sleep, state

HEADER = struct.Struct("!6H")  # id, flags, and how many questions, answers, authorities and additional records follow
RECORD = struct.Struct("!HHIH")  # what follows the name of a record: type, class, TTL, length of the data
TTL_AT = 4  # where the TTL is in a RECORD

RESPONSE, OPCODE, AUTHORITATIVE, TRUNCATED = 0x8000, 0x7800, 0x0400, 0x0200
RECURSION, RECURSION_OFFERED, AUTHENTICATED, UNCHECKED = 0x0100, 0x0080, 0x0020, 0x0010
ASKED_FLAGS = RECURSION | AUTHENTICATED | UNCHECKED  # the flags of a query that are passed on
CODE = 0x000F
NO_ERROR, FORMAT_ERROR, SERVER_FAILURE, NO_SUCH_NAME, NOT_IMPLEMENTED = range(5)

SOA, OPT = 6, 41
DNSSEC = 0x8000  # in the TTL of an OPT: the client wants signatures (RFC 3225)
PLAIN_BYTES = 512  # how long an answer may be without EDNS
EDNS_BYTES = 1232  # and with it: longer datagrams may not fit the network in one piece

WAITS_S = (0.5, 1.0, 2.0)  # how long each attempt waits for its answer
ANSWERS_MAX = 10_000
LASTS_S_MAX = 86_400


@dataclass(frozen=True)
class Query:
    """What a client asks. `size` is the longest answer that it takes, and `edns` the flags of its OPT, if any."""

    id: int
    flags: int
    question: bytes  # a name, a type and a class, as in the message
    size: int
    edns: int | None

    @property
    def key(self) -> tuple[bytes, bytes, int, bool]:
        """What two queries have in common that have the same answer."""
        name, kind = self.question[:-4], self.question[-4:]
        return name.lower(), kind, self.flags & ASKED_FLAGS, bool((self.edns or 0) & DNSSEC)


@dataclass(frozen=True)
class Answer:
    """What the resolver has answered. `records` is all that follows the question, but no OPT."""

    flags: int
    counts: tuple[int, int, int]  # answers, authorities, additional records
    records: bytes
    ttls: tuple[tuple[int, int], ...]  # each TTL, and where it is in `records`
    came_at: float
    lasts_s: int  # 0: it must not be kept


class Dns(StateRequestHandler):
    """Answers one query. The next one of the same client is another request."""

    answers: ClassVar[dict[Any, Answer]] = {}  # by key; the oldest come first

    asked: Query
    upstream: Connection
    id: int = 0  # of our own query
    attempts: int = 0
    until: float = 0.0  # when the present attempt is over

    @state(rest(EDNS_BYTES))  # and not datagram(), which would make later queries a part of this request
    def query(self, message: bytes) -> Transition:
        """Read a query, and answer it at once if its answer is known."""
        if len(message) < HEADER.size or message[2] & 0x80:
            return None  # no query: an answer might be answered in turn, for ever
        try:
            self.asked = read_query(message)
        except (ValueError, IndexError, struct.error):
            return self.refuse(FORMAT_ERROR, message)
        if self.asked.flags & OPCODE:
            return self.refuse(NOT_IMPLEMENTED, message)
        known = self.answers.get(self.asked.key)
        if known is not None and self.now < known.came_at + known.lasts_s:
            self.send(write_answer(self.asked, known, self.now))
            return None
        return self.connected, connect(os.environ.get("DNS_UPSTREAM", "udp://127.0.0.1:53"))

    @state()
    def connected(self, upstream: Connection) -> Transition:
        """Choose an id, and ask."""
        self.upstream = upstream
        self.id = secrets.randbelow(2**16)
        return self.ask()

    def ask(self) -> Transition:
        self.upstream.send(write_query(self.id, self.asked))
        self.until = self.now + WAITS_S[self.attempts]
        self.attempts += 1
        return self.wait()

    def wait(self) -> Transition:
        return self.waited, either(self.upstream.datagram(), sleep(max(0.0, self.until - self.now)))

    @state()
    def waited(self, arrived: Arrived) -> Transition:
        """Pass the answer on, or ask again."""
        if arrived.index:
            return self.ask() if self.attempts < len(WAITS_S) else self.fail()
        answer = read_answer(arrived.item, self.id, self.asked.question, self.now)
        if answer is None:
            return self.wait()  # it is forged, or broken: the true one may still come
        if answer.lasts_s:
            self.keep(answer)
        self.send(write_answer(self.asked, answer, self.now))
        return None

    def keep(self, answer: Answer) -> None:
        """Keep an answer, in place of the oldest one if there are too many."""
        self.answers.pop(self.asked.key, None)
        if len(self.answers) >= ANSWERS_MAX:
            self.answers.pop(next(iter(self.answers)), None)
        self.answers[self.asked.key] = answer

    def on_error(self, error: Exception) -> Transition:
        if not isinstance(error, OSError):
            raise error
        return self.fail()  # nobody listens at the resolver's address, or it can't be reached

    def fail(self) -> Transition:
        nothing = Answer(RESPONSE | RECURSION_OFFERED | SERVER_FAILURE, (0, 0, 0), b"", (), self.now, 0)
        self.send(write_answer(self.asked, nothing, self.now))
        return None

    def refuse(self, code: int, message: bytes) -> Transition:
        """Answer a query that can't be served: with no more than a header."""
        id, flags, *_ = HEADER.unpack_from(message)
        self.send(HEADER.pack(id, RESPONSE | flags & (OPCODE | RECURSION) | code, 0, 0, 0, 0))
        return None

    @property
    def now(self) -> float:
        return float(self.server.table.now)


# -- messages: the functions that read them raise ValueError, IndexError or struct.error if they are broken -----------


def read_query(message: bytes) -> Query:
    id, flags, questions, *counts = HEADER.unpack_from(message)
    if questions != 1:
        raise ValueError("a query has one question")
    at = after_question(message)
    question = message[HEADER.size : at]
    size, edns = PLAIN_BYTES, None
    for _ in range(sum(counts)):
        at = after_name(message, at)
        kind, class_, ttl, length = RECORD.unpack_from(message, at)
        if kind == OPT:  # its class is a size, and its TTL has flags
            size, edns = min(max(class_, PLAIN_BYTES), EDNS_BYTES), ttl & DNSSEC
        at += RECORD.size + length
    return Query(id, flags, question, size, edns)


def write_query(id: int, query: Query) -> bytes:
    """Return our own query with the question of a client's."""
    return HEADER.pack(id, query.flags & ASKED_FLAGS, 1, 0, 0, 1) + query.question + opt(query.edns or 0)


def read_answer(message: bytes, id: int, question: bytes, now: float) -> Answer | None:
    """Return the answer to a query; None if `message` is not that."""
    try:
        its_id, flags, questions, *counts = HEADER.unpack_from(message)
        start = HEADER.size + len(question)
        if (its_id, questions, message[HEADER.size : start]) != (id, 1, question) or not flags & RESPONSE:
            return None
        return read_records(message, start, flags, counts, now)
    except (ValueError, IndexError, struct.error):
        return None


def read_records(message: bytes, start: int, flags: int, counts: list[int], now: float) -> Answer:
    at = start
    ttls: list[tuple[int, int]] = []
    lasts_s = LASTS_S_MAX
    is_positive = counts[0] > 0 and flags & CODE == NO_ERROR
    may_be_kept = is_positive
    for number in range(sum(counts)):
        record_at = at
        at = after_name(message, at)
        kind, _, ttl, length = RECORD.unpack_from(message, at)
        if kind == OPT:
            # It is for us alone, and all that follows it can be done without.
            at = record_at
            counts[2] = number - counts[0] - counts[1]
            break
        ttls.append((ttl if ttl < 2**31 else 0, at + TTL_AT - start))  # RFC 2181, 8
        at += RECORD.size + length
        lasts_s = min(lasts_s, ttls[-1][0])
        if kind == SOA and flags & CODE in (NO_ERROR, NO_SUCH_NAME) and not is_positive:
            may_be_kept = True  # its last field says for how long there will be no such thing (RFC 2308, 5)
            lasts_s = min(lasts_s, *struct.unpack_from("!I", message, at - 4))
    if at > len(message) or counts[2] < 0:
        raise ValueError("the message is too short, or its OPT is out of place")
    if flags & TRUNCATED or not may_be_kept:
        lasts_s = 0
    return Answer(flags, (counts[0], counts[1], counts[2]), message[start:at], tuple(ttls), now, lasts_s)


def write_answer(query: Query, answer: Answer, now: float) -> bytes:
    """Return an answer as the client of `query` gets it. It is cut if it is longer than the client takes."""
    records = bytearray(answer.records)
    for ttl, at in answer.ttls:
        struct.pack_into("!I", records, at, max(0, ttl - int(now - answer.came_at)))
    flags = answer.flags & ~AUTHORITATIVE & ~OPCODE | query.flags & RECURSION
    answers, authorities, additional = answer.counts
    end = b"" if query.edns is None else opt(query.edns)
    if HEADER.size + len(query.question) + len(records) + len(end) > query.size:
        flags |= TRUNCATED
        answers = authorities = additional = 0
        records.clear()
    header = HEADER.pack(query.id, flags, 1, answers, authorities, additional + bool(end))
    return header + query.question + records + end


def opt(flags: int) -> bytes:
    """Return the record that says how long a datagram we take, and flags: this is EDNS."""
    return b"\0" + RECORD.pack(OPT, EDNS_BYTES, flags, 0)


def after_question(message: bytes) -> int:
    """Return where the question ends."""
    at = after_name(message, HEADER.size) + 4
    if at > len(message):
        raise ValueError("the question is cut off")
    return at


def after_name(message: bytes, at: int) -> int:
    """Return where a name ends that begins at `at`: with an empty label, or with a pointer to the rest of the name."""
    while length := message[at]:
        if length & 0xC0 == 0xC0:
            return at + 2
        if length & 0xC0:
            raise ValueError("no such kind of label")
        at += 1 + length
    return at + 1
