"""The example DNS forwarder, with dig as its client, and a resolver that loses, forges and breaks answers."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any

import dnslib
import pytest

import examples.dns_forwarder
from examples.dns_forwarder import ANSWERS_MAX, HEADER, Dns, read_answer, read_query, write_answer, write_query
from reqtable import Limits, UDPServer
from reqtable.config import Config
from reqtable.testing import FakeClock
from tests.service import Service
from tests.support import WAIT_S, serving, wait_until
from tests.test_datagram import Stepwise, peer_of
from tests.test_examples import program

ZONE = """
site.example. 300 IN A 192.0.2.1
alias.example. 60 IN CNAME site.example.
alias.example. 300 IN A 192.0.2.1
fleeting.example. 0 IN A 192.0.2.2
"""
SOA = dnslib.RR.fromZone("example. 900 IN SOA ns.example. me.example. 1 2 3 4 30")[0]


def resolve(query: dnslib.DNSRecord) -> dnslib.DNSRecord:
    """Return the answer to a query: from the zone, or that there is no such name."""
    answer = query.reply()
    found = [each for each in dnslib.RR.fromZone(ZONE) if each.rname == query.q.qname]
    for each in found if query.q.qtype == dnslib.QTYPE.A else []:
        answer.add_answer(each)
    if query.q.qname == "big.example":
        answer.add_answer(*dnslib.RR.fromZone("".join(f"big.example. 60 IN A 192.0.2.{n}\n" for n in range(40))))
    elif not answer.rr:
        answer.header.rcode = dnslib.RCODE.NOERROR if found else dnslib.RCODE.NXDOMAIN
        answer.add_auth(SOA)
    answer.add_ar(dnslib.EDNS0(udp_len=4096))
    return answer


class Resolver:
    """A resolver on a free port. `answers(query, number)` returns the datagrams that answer a query."""

    def __init__(self, answers: Callable[[dnslib.DNSRecord, int], list[bytes]]) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.address = f"udp://127.0.0.1:{self.socket.getsockname()[1]}"
        self.queries: list[dnslib.DNSRecord] = []
        self.ports: list[int] = []
        self._answers = answers
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while True:
            data, peer = self.socket.recvfrom(65_536)
            if not data:
                return
            query = dnslib.DNSRecord.parse(data)
            self.queries.append(query)
            self.ports.append(peer[1])
            for answer in self._answers(query, len(self.queries)):
                self.socket.sendto(answer, peer)

    def __enter__(self) -> Resolver:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"", self.socket.getsockname())
        self._thread.join(WAIT_S)
        self.socket.close()


def question(name: str, id: int = 1) -> bytes:
    """Return a query as a client sends it, without EDNS."""
    query = dnslib.DNSRecord.question(name)
    query.header.id = id
    return bytes(query.pack())


def always(query: dnslib.DNSRecord, number: int) -> list[bytes]:
    return [bytes(resolve(query).pack())]


def never(query: dnslib.DNSRecord, number: int) -> list[bytes]:
    return []


def the_third(query: dnslib.DNSRecord, number: int) -> list[bytes]:
    return always(query, number) if number == 3 else []


@pytest.fixture(autouse=True)
def patient_and_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin each test without answers. A slow machine is no reason to ask again."""
    monkeypatch.setattr(Dns, "answers", {})
    monkeypatch.setattr(examples.dns_forwarder, "WAITS_S", (WAIT_S, WAIT_S, WAIT_S))


@contextlib.contextmanager
def forwarding(
    monkeypatch: pytest.MonkeyPatch,
    answers: Callable[[dnslib.DNSRecord, int], list[bytes]] = always,
    limits: Limits | None = None,
) -> Iterator[tuple[Any, Resolver]]:
    """Run a resolver and a forwarder to it during the block. Then no row may be left."""
    with Resolver(answers) as resolver:
        monkeypatch.setenv("DNS_UPSTREAM", resolver.address)
        with serving(UDPServer(("127.0.0.1", 0), Dns, config=Config(limits=limits or Limits()))) as server:
            yield server, resolver
            wait_until(server, lambda: not (len(server.table) or server.table.connections))


def dig(server: Any, *asked: str) -> str:
    """Return what dig prints: its own defaults are EDNS, and a cookie."""
    port = str(server.server_address[1])
    command = [program("dig"), "@127.0.0.1", "-p", port, "+tries=1", "+timeout=10", *asked]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stdout
    assert "WARNING" not in done.stdout.upper(), done.stdout
    return done.stdout


def test_dig_gets_an_answer_and_the_second_one_comes_from_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with forwarding(monkeypatch) as (server, resolver):
        first = dig(server, "alias.example")
        assert "status: NOERROR" in first
        assert re.search(r"^alias\.example\.\s+60\s+IN\s+CNAME\s+site\.example\.$", first, re.MULTILINE)
        assert re.search(r"^alias\.example\.\s+300\s+IN\s+A\s+192\.0\.2\.1$", first, re.MULTILINE)
        assert "192.0.2.1" in dig(server, "AliaS.ExamplE"), "the case of letters makes no difference"
        assert len(resolver.queries) == 1
        assert [str(each.q.qname) for each in resolver.queries] == ["alias.example."]


@pytest.mark.parametrize("edns", ["+edns", "+noedns"])
def test_a_name_that_does_not_exist_is_remembered_too(monkeypatch: pytest.MonkeyPatch, edns: str) -> None:
    with forwarding(monkeypatch) as (server, resolver):
        for _ in range(2):
            answer = dig(server, edns, "missing.example")
            assert "status: NXDOMAIN" in answer
            assert ("EDNS: version: 0" in answer) == (edns == "+edns")
        assert len(resolver.queries) == 1


def test_queries_of_other_kinds_have_other_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with forwarding(monkeypatch) as (server, resolver):
        assert "192.0.2.1" in dig(server, "+short", "site.example", "A")
        assert dig(server, "+short", "site.example", "AAAA") == ""
        assert "192.0.2.1" in dig(server, "+short", "+dnssec", "site.example", "A")
        assert "192.0.2.1" in dig(server, "+short", "+cdflag", "site.example", "A")
        asked = [(each.q.qtype, each.header.bitmap & 0x10, each.ar[0].edns_do) for each in resolver.queries]
        assert asked == [(1, 0, 0), (28, 0, 0), (1, 0, 1), (1, 0x10, 0)]


def test_queries_that_are_lost_are_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples.dns_forwarder, "WAITS_S", (0.05, 0.05, WAIT_S))
    with forwarding(monkeypatch, the_third) as (server, resolver):
        assert "192.0.2.1" in dig(server, "+short", "site.example")
        assert len(resolver.queries) == 3
        assert len({each.header.id for each in resolver.queries}) == 1


def test_a_resolver_that_never_answers_is_a_failure_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples.dns_forwarder, "WAITS_S", (0.05, 0.05, 0.05))
    with forwarding(monkeypatch, never) as (server, resolver):
        assert "status: SERVFAIL" in dig(server, "site.example")
        assert len(resolver.queries) == 3
        assert not Dns.answers


def test_a_resolver_that_is_not_there_is_a_failure_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with forwarding(monkeypatch) as (server, _), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", 0))
        monkeypatch.setenv("DNS_UPSTREAM", f"udp://127.0.0.1:{other.getsockname()[1]}")
        other.close()
        assert "status: SERVFAIL" in dig(server, "site.example")


def test_no_more_connections_is_a_failure_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with forwarding(monkeypatch, never, Limits(connections_max=1)) as (server, resolver):
        with peer_of(server) as peer:
            peer.send(question("one.example"))
            wait_until(server, lambda: len(resolver.queries) == 1)
            assert "status: SERVFAIL" in dig(server, "two.example")
            for entry in server.table:
                server.table.cancel(entry.id)


def test_forged_and_broken_answers_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(query: dnslib.DNSRecord, number: int) -> list[bytes]:
        true = resolve(query).pack()
        forged = resolve(query)
        forged.rr[0].rdata = dnslib.A("6.6.6.6")
        other_id, other_question, no_answer = (dnslib.DNSRecord.parse(forged.pack()) for _ in range(3))
        other_id.header.id ^= 1
        other_question.q.qname = "evil.example"
        no_answer.header.qr = 0
        broken = [forged.pack()[:count] for count in (0, 1, 11, 12, 20, 40, 50)]
        return [other_id.pack(), other_question.pack(), no_answer.pack(), *broken, true]

    with forwarding(monkeypatch, answers) as (server, resolver):
        assert dig(server, "+short", "site.example") == "192.0.2.1\n"
        assert len(resolver.queries) == 1


def test_each_query_has_its_own_port_and_id(monkeypatch: pytest.MonkeyPatch) -> None:
    with forwarding(monkeypatch) as (server, resolver), peer_of(server) as peer:
        for number in range(20):  # all at once, from one port of the client
            peer.send(question(f"n{number}.example", number))
        answers = [dnslib.DNSRecord.parse(peer.recv(2000)) for _ in range(20)]
        assert {f"n{each.header.id}.example." for each in answers} == {str(each.q.qname) for each in answers}
        assert len(set(resolver.ports)) > 15
        assert len({each.header.id for each in resolver.queries}) > 15


def test_a_long_answer_is_cut_for_a_client_without_edns(monkeypatch: pytest.MonkeyPatch) -> None:
    with forwarding(monkeypatch) as (server, resolver):
        assert len(dig(server, "+short", "big.example").splitlines()) == 40
        cut = dig(server, "+noedns", "+ignore", "big.example")
        assert re.search(r"flags: [a-z ]*\btc\b", cut)
        assert "ANSWER: 0" in cut
        assert len(resolver.queries) == 1


def test_an_answer_that_the_resolver_has_cut_is_passed_on_but_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(query: dnslib.DNSRecord, number: int) -> list[bytes]:
        answer = resolve(query)
        answer.header.tc = 1
        return [answer.pack()]

    with forwarding(monkeypatch, answers) as (server, resolver):
        for _ in range(2):
            cut = dig(server, "+ignore", "site.example")
            assert re.search(r"flags: [a-z ]*\btc\b", cut)
            assert "192.0.2.1" in cut
        assert len(resolver.queries) == 2


def test_an_answer_without_a_lifetime_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    with forwarding(monkeypatch) as (server, resolver):
        for _ in range(2):
            assert dig(server, "+short", "fleeting.example") == "192.0.2.2\n"
        assert len(resolver.queries) == 2


def test_the_command_of_its_docstring_serves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = re.search(
        r"^    DNS_UPSTREAM=\S+ reqtable serve (\S+) --bind (udp://\S+):\d+$",
        examples.dns_forwarder.__doc__ or "",
        re.MULTILINE,
    )
    assert found is not None
    with Resolver(always) as resolver:
        monkeypatch.setenv("DNS_UPSTREAM", resolver.address)
        with Service(handler=found[1], bind=f"{found[2]}:0", workers=None) as service:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.settimeout(WAIT_S)
                client.connect(service.address)
                client.send(question("site.example"))
                assert str(dnslib.DNSRecord.parse(client.recv(2000)).short()) == "192.0.2.1"


# -- without a resolver ------------------------------------------------------------------------------------------------


def test_an_answer_grows_old_and_is_forgotten() -> None:
    query = read_query(question("alias.example"))
    answer = read_answer(resolve(dnslib.DNSRecord.parse(write_query(7, query))).pack(), 7, query.question, 100.0)
    assert answer is not None
    assert answer.lasts_s == 60
    ttls = [each.ttl for each in dnslib.DNSRecord.parse(write_answer(query, answer, 142.9)).rr]
    assert ttls == [18, 258]
    missing = read_query(question("missing.example"))
    answer = read_answer(resolve(dnslib.DNSRecord.parse(write_query(7, missing))).pack(), 7, missing.question, 100.0)
    assert answer is not None
    assert answer.lasts_s == 30, "the last field of the SOA is less than its TTL"


def test_an_answer_that_is_too_old_is_asked_for_again(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DNS_UPSTREAM", "udp://127.0.0.1:9")
    query = read_query(question("alias.example"))
    with Stepwise(clock, Dns) as world, peer_of(world.server) as peer:
        raw = bytes(resolve(dnslib.DNSRecord.parse(write_query(7, query))).pack())
        Dns.answers[query.key] = read_answer(raw, 7, query.question, clock())  # type: ignore[assignment]
        for passed, is_known in ((0, True), (59, True), (1, False)):
            clock.jump(passed) if passed else None
            peer.send(question("alias.example"))
            world.passes()
            assert bool(world.server.table.connection_counts["opened"]) == (not is_known)
            if is_known:
                assert dnslib.DNSRecord.parse(peer.recv(2000)).rr[0].ttl == 60 - passed


def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples.dns_forwarder, "ANSWERS_MAX", 3)
    with forwarding(monkeypatch) as (server, _), peer_of(server) as peer:
        for number in range(5):
            peer.send(question(f"n{number}.example"))
            peer.recv(2000)
        assert [key[0] for key in Dns.answers] == [b"\2n%d\7example\0" % number for number in (2, 3, 4)]
    assert ANSWERS_MAX == 10_000


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (b"", None),
        (b"\0" * 11, None),
        (HEADER.pack(1, 0x8000, 1, 0, 0, 0) + b"\0\0\1\0\1", None),  # an answer
        (HEADER.pack(1, 0x0100, 0, 0, 0, 0), 1),
        (HEADER.pack(1, 0x0100, 2, 0, 0, 0) + b"\0\0\1\0\1" * 2, 1),
        (HEADER.pack(1, 0x0100, 1, 0, 0, 0) + b"\0\0\1\0", 1),
        (HEADER.pack(1, 0x0100, 1, 0, 0, 0) + b"\1a", 1),
        (HEADER.pack(1, 0x0100, 1, 0, 0, 0) + b"\x41" * 80, 1),  # a kind of label that does not exist
        (HEADER.pack(1, 0x0100, 1, 0, 0, 9) + b"\0\0\1\0\1", 1),
        (HEADER.pack(1, 0x2900, 1, 0, 0, 0) + b"\0\0\1\0\1", 4),  # an update
    ],
)
def test_a_message_that_is_no_query(clock: FakeClock, message: bytes, code: int | None) -> None:
    with Stepwise(clock, Dns) as world, peer_of(world.server) as peer:
        peer.setblocking(False)
        peer.send(message)
        world.passes()
        if code is None:
            with pytest.raises(BlockingIOError):
                peer.recv(2000)
        else:
            answer = peer.recv(2000)
            assert len(answer) == HEADER.size
            assert answer[:2] == message[:2]
            assert (answer[2] & 0x80, answer[3] & 15) == (0x80, code)
        assert len(world.server.table) == 0
