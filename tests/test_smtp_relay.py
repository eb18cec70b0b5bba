"""`examples/smtp_relay.py` between Python's smtplib and another server, which is of the same class or scripted."""

from __future__ import annotations

import contextlib
import smtplib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from examples.smtp_relay import NAME, Mail, MailServer, Relay
from reqtable import AsyncRequestHandler, line
from reqtable.testing import exercise
from tests.certificates import begin_tls, client_context, write_certificate
from tests.support import WAIT_S, Client, open_descriptors, served, wait_until

ANN, BOB, CID = "ann@example.org", "bob@example.org", "cid@example.org"
OK = b"250 2.0.0 taken\r\n"
DOTTED = b"Subject: dots\r\n\r\n.\r\n..\r\n.a\r\n...\r\n\r\na.\r\n.\r\n\xff\0\r\nend\r\n"


class Sink(MailServer):
    """Keeps the messages that it receives."""

    kept: ClassVar[list[Mail]] = []
    were_encrypted: ClassVar[list[bool]] = []
    certificate = None

    async def deliver(self, mail: Mail) -> bytes:
        self.kept.append(mail)
        self.were_encrypted.append(self.tls is not None)
        return OK[:-2]


def sink(**attributes: Any) -> Any:
    return type("Sink", (Sink,), {"kept": [], "were_encrypted": [], **attributes})


def relay(address: Any, **attributes: Any) -> Any:
    return type("Relay", (Relay,), {"next_server": f"tcp://127.0.0.1:{address[1]}", "certificate": None, **attributes})


@contextlib.contextmanager
def chain(target: Any, **attributes: Any) -> Iterator[tuple[Any, Any]]:
    """Run a relay, and its next server with the handler class `target`. Afterwards nothing of a request is left."""
    with served(target) as upstream, served(relay(upstream.server_address, **attributes)) as server:
        yield server, upstream
        wait_until(server, lambda: len(server.table) == len(server.table.connections) == 0)
        wait_until(upstream, lambda: len(upstream.table) == 0)
        for each in (server, upstream):
            assert each.stats()["buffered_bytes"] == 0


@contextlib.contextmanager
def smtp(server: Any) -> Iterator[smtplib.SMTP]:
    with smtplib.SMTP("127.0.0.1", server.server_address[1], "client.example.org", timeout=WAIT_S) as client:
        yield client


# -- forwarding ------------------------------------------------------------------------------------------------------


def test_a_message_arrives_byte_for_byte() -> None:
    target = sink()
    with chain(target) as (server, _), smtp(server) as client:
        assert client.sendmail(ANN, [BOB, CID], DOTTED) == {}
        assert client.sendmail("", BOB, b"") == {}
        assert client.sendmail(ANN, CID, big := (b"." * 500 + b"\r\n") * 5_000) == {}
    assert target.kept == [
        Mail(ANN.encode(), [BOB.encode(), CID.encode()], DOTTED),
        Mail(b"", [BOB.encode()], b"\r\n"),
        Mail(ANN.encode(), [CID.encode()], big),
    ]


def test_the_answer_is_that_of_the_next_server() -> None:
    target = sink()
    with chain(target) as (server, _), Client(server.server_address) as client:
        assert client.line().startswith(b"220 ")
        assert client.ask(b"HELO me\r\n") == b"250 " + NAME + b"\r\n"
        assert client.ask(b"MAIL FROM:<a@b>\r\n").startswith(b"250")
        assert client.ask(b"RCPT TO:<c@d>\r\n").startswith(b"250")
        assert client.ask(b"DATA\r\n").startswith(b"354")
        assert client.ask(b"hello\r\n.\r\n") == OK
        assert client.ask(b"QUIT\r\n").startswith(b"221")
        assert client.rest() == b""
    assert target.kept == [Mail(b"a@b", [b"c@d"], b"hello\r\n")]


def test_a_client_that_pipelines_is_answered_in_order() -> None:
    target = sink()
    one = b"MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n"
    with chain(target) as (server, _), Client(server.server_address) as client:
        client.send(b"EHLO me\r\n" + one + b"1\r\n.\r\n" + one + b"2\r\n.\r\nQUIT\r\n")
        codes = [each[:3] for each in client.rest().splitlines()]
    assert codes == [b"220", b"250", b"250"] + [b"250", b"250", b"354", b"250"] * 2 + [b"221"]
    assert [each.data for each in target.kept] == [b"1\r\n", b"2\r\n"]


# -- TLS -------------------------------------------------------------------------------------------------------------


def test_both_sides_are_encrypted(tmp_path: Path) -> None:
    certificate = write_certificate(tmp_path)
    target = sink(certificate=certificate)
    with (
        chain(target, certificate=certificate, next_ca=str(tmp_path / "ca.pem")) as (server, _),
        smtp(server) as client,
    ):
        client.starttls(context=client_context())
        client.ehlo()
        assert not client.has_extn("starttls"), "it is offered once"
        assert client.sendmail(ANN, BOB, DOTTED) == {}
        assert client.sendmail(ANN, BOB, (b"." * 500 + b"\r\n") * 5_000) == {}
    assert [each.data for each in target.kept] == [DOTTED, (b"." * 500 + b"\r\n") * 5_000]
    assert target.were_encrypted == [True, True]


def test_nothing_that_was_said_before_tls_counts(tmp_path: Path) -> None:
    with served(relay(("", 1), certificate=write_certificate(tmp_path))) as server:
        with Client(server.server_address) as client:
            client.send(b"EHLO me\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nSTARTTLS\r\n")
            while not client.line().startswith(b"220 2.0.0 begin"):
                pass
            begin_tls(client)
            assert client.ask(b"DATA\r\n").startswith(b"503")
            assert client.ask(b"MAIL FROM:<a@b>\r\n").startswith(b"503")
            assert client.ask(b"STARTTLS\r\n").startswith(b"500")
            assert client.ask(b"QUIT\r\n").startswith(b"221")


@pytest.mark.parametrize("behind", [b"RSET\r\n", b"X", b"MAIL FROM:<mallory@example.org>\r\n"])
def test_what_is_pipelined_behind_starttls_is_refused(
    tmp_path: Path, behind: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with served(relay(("", 1), certificate=write_certificate(tmp_path))) as server:
        with Client(server.server_address) as client:
            caplog.set_level("INFO")
            client.send(b"EHLO me\r\nSTARTTLS\r\n" + behind)
            with contextlib.suppress(ConnectionError):
                assert client.rest().endswith(b"220 2.0.0 begin\r\n"), "no answer to what followed"
        wait_until(server, lambda: len(server.table) == 0)
    [record] = [each for each in caplog.records if "input came before the TLS handshake" in each.getMessage()]
    assert record.exc_info is None


def test_a_next_server_whose_certificate_is_not_trusted_gets_no_mail(tmp_path: Path) -> None:
    target = sink(certificate=write_certificate(tmp_path, "other.example.org"))
    with chain(target, next_ca=str(tmp_path / "ca.pem")) as (server, _), smtp(server) as client:
        with pytest.raises(smtplib.SMTPDataError) as error:
            client.sendmail(ANN, BOB, b"secret")
        assert error.value.smtp_code == 451
    assert target.kept == []


# -- limits ----------------------------------------------------------------------------------------------------------


def test_a_message_that_is_too_large_is_refused_and_not_kept() -> None:
    target = sink()
    with chain(target, message_bytes_max=100_000) as (server, _):
        with smtp(server) as client:  # it announces the size
            with pytest.raises(smtplib.SMTPSenderRefused) as refused:
                client.sendmail(ANN, BOB, b"x" * 100_001)
            assert refused.value.smtp_code == 552
            client.rset()
            assert client.sendmail(ANN, BOB, (b"x" * 998 + b"\r\n") * 100) == {}
        with Client(server.server_address) as client:  # it announces nothing
            client.send(b"HELO me\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n")
            for _ in range(5):
                client.line()
            for _ in range(200):
                client.send((b"." + b"x" * 998 + b"\r\n") * 100)
                assert server.stats()["buffered_bytes"] < 1_000_000
            assert client.ask(b".\r\n").startswith(b"552 ")
            assert client.ask(b"NOOP\r\n").startswith(b"250 ")
            assert client.ask(b"QUIT\r\n").startswith(b"221 ")
    assert [len(each.data) for each in target.kept] == [100_000]


def test_lines_that_two_servers_could_read_differently_are_refused() -> None:
    """Otherwise a message could smuggle another one past the first of them."""
    for bad in (b"a\n.\r\nMAIL FROM:<x@y>\r\n", b"a\r\n.\nb\r\n", b"\n.\n\r\n", b"a\rb\r\n"):
        mail = sink()
        request = exercise(mail).send(b"HELO me\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n")
        request.send(bad + b".\r\nNOOP\r\n")
        assert b"354" in request.output
        assert request.output.endswith(
            b"554 5.6.0 lines end with CR LF, and both are nowhere else\r\n250 2.0.0 fine\r\n"
        )
        assert mail.kept == []


# -- the next server fails -------------------------------------------------------------------------------------------


def test_a_next_server_that_is_down(unused_port: int) -> None:
    before = open_descriptors()
    with served(relay(("", unused_port))) as server, smtp(server) as client:
        for _ in range(3):
            with pytest.raises(smtplib.SMTPDataError) as error:
                client.sendmail(ANN, BOB, b"hello")
            assert (error.value.smtp_code, error.value.smtp_error[:5]) == (451, b"4.4.1")
    assert open_descriptors() == before


class Scripted(AsyncRequestHandler):
    """Answers each line as `script` says; after the last answer it closes the connection."""

    script: ClassVar[list[bytes]]

    async def handle(self) -> None:
        for answer in self.script:
            await self.send(answer)
            if answer is not self.script[-1]:
                await self.read(line(2_000_000))


GOOD = [b"220 hi\r\n", b"250-hi\r\n250 SIZE\r\n", b"250 ok\r\n", b"250 ok\r\n", b"354 go\r\n"]


@pytest.mark.parametrize(
    ("script", "code"),
    [
        *[(GOOD[:count], 451) for count in range(len(GOOD) + 1)],  # it dies after so many answers
        ([b"220"], 451),
        ([b"hello\r\n"], 451),
        ([b"250-x\r\n" * 101], 451),
        ([b"x" * 3000], 451),
        ([b"220 hi\r\n", b"354 what?\r\n"], 451),
        ([b"554 5.7.1 not from there\r\n"], 554),
        ([*GOOD[:2], b"452 4.3.1 disk full\r\n"], 452),
        ([*GOOD[:3], b"550 5.1.1 nobody here\r\n"], 550),
        ([*GOOD[:4], b"421-4.3.2 we\r\n421 4.3.2 close\r\n"], 421),
        ([*GOOD, b"554 5.7.1 spam\r\n"], 554),
        ([*GOOD, b"250 2.0.0 queued\r\n"], 250),
    ],
)
def test_a_next_server_that_refuses_or_dies(script: list[bytes], code: int) -> None:
    target = type("Next", (Scripted,), {"script": script})
    with chain(target) as (server, _), Client(server.server_address) as client:
        client.send(b"EHLO me\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nhello\r\n.\r\nNOOP\r\nQUIT\r\n")
        *_, last, noop, bye = client.rest().splitlines()
    assert (int(last[:3]), noop[:3], bye[:3]) == (code, b"250", b"221")
    assert last in b"".join(script) or code == 451


def test_a_client_that_leaves_while_its_message_is_forwarded() -> None:
    target = type("Next", (Scripted,), {"script": [b"220 hi\r\n", b"250-", b""]})  # its answer to EHLO has no end
    with chain(target) as (server, upstream):
        with Client(server.server_address) as client:
            client.send(b"EHLO me\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nhello\r\n.\r\n")
            wait_until(upstream, lambda: [entry.steps for entry in upstream.table] == [2])
            client.reset()
        wait_until(server, lambda: not server.table)


# -- the dialogue ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [True, False], ids=["whole", "byte by byte"])
@pytest.mark.parametrize(
    ("given", "codes"),
    [
        ("NOOP|noop|RSET|VRFY x|\x00|QUIT", "250 250 250 500 500 221"),
        ("MAIL FROM:<a>|RCPT TO:<b>|DATA", "503 503 503"),
        ("HELO|EHLO|HELO x|EHLO x", "501 501 250 250 250"),
        (
            "HELO x|MAIL|MAIL FROM:a|MAIL FROM:<a b>|MAIL FROM:<a>x|MAIL FROM: <a>|MAIL FROM:<b>",
            "250 501 501 501 501 250 503",
        ),
        (
            "HELO x|MAIL FROM:<a> SIZE=99999999|MAIL FROM:<a> SIZE=x|MAIL FROM:<a> X|mail from:<a> size=9",
            "250 552 555 555 250",
        ),
        (
            "HELO x|MAIL FROM:<>|RCPT TO:<>|RCPT TO:b|RCPT TO:<b> X=1|RCPT TO:<b>|HELO x|RCPT TO:<b>",
            "250 250 501 501 501 250 250 503",
        ),
        ("HELO x|MAIL FROM:<a>|" + "|".join(["RCPT TO:<b>"] * 101), "250 250" + " 250" * 100 + " 452"),
        ("HELO x|MAIL FROM:<a>|RCPT TO:<b>|RSET|DATA", "250 250 250 250 503"),
        ("STARTTLS|HELO x", "500 250"),
        ("x" * 3000 + "|NOOP", "500 250"),
        ("HELO x|MAIL FROM:<a>|RCPT TO:<b>|DATA|" + "y" * 70_000 + "|.|NOOP", "250 250 250 354 500"),
    ],
)
def test_the_dialogue(given: str, codes: str, at_once: bool) -> None:
    request = exercise(sink())
    data = b"".join(each.encode() + b"\r\n" for each in given.split("|"))
    for start in range(0, len(data), len(data) if at_once else max(1, len(data) // 500)):
        if not request.is_over:
            request.send(data[start : start + (len(data) if at_once else max(1, len(data) // 500))])
    assert [each[:3].decode() for each in request.output.splitlines()] == ["220", *codes.split()]


@pytest.mark.parametrize("said", [b"", b"EHLO me\r\nMAIL FROM:<a>\r\nRCPT TO:<b>\r\nDATA\r\nhalf"])
def test_a_client_that_is_silent_for_too_long(said: bytes) -> None:
    request = exercise(sink()).send(said).jump(299)
    assert not request.is_over
    request.jump(2)
    assert request.output.endswith(b"421 4.4.2 you take too long\r\n")
    assert request.is_over


def test_a_client_that_is_silent_in_the_tls_handshake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("examples.smtp_relay.HANDSHAKE_S", 0.05)
    with served(relay(("", 1), certificate=write_certificate(tmp_path))) as server:
        with Client(server.server_address) as client:
            client.send(b"STARTTLS\r\n")
            assert client.line().startswith(b"220 ")
            assert client.line().startswith(b"220 ")
            assert client.rest() == b"", "nothing in the clear follows"
        wait_until(server, lambda: len(server.table) == 0)
        assert {how for how, count in server.stats()["finished"].items() if count} == {"timeout"}
