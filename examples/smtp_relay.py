"""Receives mail and passes each message on to another mail server (RFC 5321), with TLS on both sides (STARTTLS).

The next server answers before the client does, and the client gets that answer. So there is no queue, and no message
is lost: whoever has not heard 250 still has the message.

    SMTP_NEXT=tcp://127.0.0.1:1025 reqtable serve examples/smtp_relay.py:Relay --bind tcp://127.0.0.1:2525

SMTP_CERTIFICATE names the PEM file of a certificate and its key: clients may then encrypt. If the next server offers
STARTTLS, its certificate is checked by those in the file SMTP_NEXT_CA, or by the system's.
"""

import contextlib
import logging
import os
import re
import socket
from dataclasses import dataclass, field
from typing import ClassVar

from reqtable import AsyncRequestHandler, LimitExceeded, PeerError, connect, line, skip_line, start_tls, until
from reqtable.net.connection import Connection

COMMAND_BYTES_MAX = 2_000
RECIPIENTS_MAX = 100
ANSWER_LINES_MAX = 100
COMMAND_S = 300  # how long to wait for a command, a line of a message, or an answer (RFC 5321, 4.5.3.2)
HANDSHAKE_S = 30
NAME = socket.gethostname().encode()

log = logging.getLogger("smtp_relay")


@dataclass
class Mail:
    """Holds a message and its envelope."""

    sender: bytes
    recipients: list[bytes] = field(default_factory=list)
    data: bytes = b""  # the lines as they were before the dots were doubled, each with its CR LF


class Refused(Exception):
    """Carries an answer of the next server that says no."""

    def __init__(self, lines: list[bytes]) -> None:
        super().__init__(b" ".join(lines).decode("ascii", "replace"))
        self.lines = lines


class MailServer(AsyncRequestHandler):
    """Receives mail. What happens with a message, `deliver` decides."""

    certificate: ClassVar[str | None] = os.environ.get("SMTP_CERTIFICATE")
    message_bytes_max: ClassVar[int] = 10 * 2**20

    is_greeted: bool = False
    mail: Mail | None = None

    async def deliver(self, mail: Mail) -> bytes:
        """Deliver a message. Returns the answer for the client."""
        raise NotImplementedError

    async def handle(self) -> None:
        await self.say(b"220 %b ESMTP" % NAME)
        try:
            while await self.command():
                pass
        except LimitExceeded:  # in a message. Where the message ends can't be told, so nothing more is read
            await self.say(b"500 5.5.2 a line is too long")
        except TimeoutError:
            await self.say(b"421 4.4.2 you take too long")

    async def command(self) -> bool:
        """Execute the next command. Returns False after the last one."""
        try:
            text = await self.read(line(COMMAND_BYTES_MAX), timeout=COMMAND_S)
        except LimitExceeded:
            await self.read(skip_line(), timeout=COMMAND_S)
            await self.say(b"500 5.5.2 the line is too long")
            return True
        if not text.endswith(b"\n"):
            return False
        verb, _, argument = text.strip().partition(b" ")
        match verb.upper():
            case b"EHLO" | b"HELO":
                await self.say(*self.hello(verb.upper(), argument))
            case b"MAIL":
                await self.say(self.begin(argument))
            case b"RCPT":
                await self.say(self.add_recipient(argument))
            case b"DATA":
                await self.say(await self.receive())
            case b"RSET":
                self.mail = None
                await self.say(b"250 2.0.0 forgotten")
            case b"NOOP":
                await self.say(b"250 2.0.0 fine")
            case b"STARTTLS" if self.can_encrypt:
                await self.encrypt()
            case b"QUIT":
                await self.say(b"221 2.0.0 bye")
                return False
            case _:
                await self.say(b"500 5.5.1 unknown command")
        return True

    async def say(self, *lines: bytes) -> None:
        await self.send(b"".join(each + b"\r\n" for each in lines))

    # -- the commands: each returns its answer ------------------------------------------------------------------------

    def hello(self, verb: bytes, name: bytes) -> list[bytes]:
        if not name:
            return [b"501 5.5.4 say your name"]
        self.is_greeted, self.mail = True, None
        if verb == b"HELO":
            return [b"250 " + NAME]
        offers = [b"250-STARTTLS"] if self.can_encrypt else []
        return [b"250-" + NAME, *offers, b"250 SIZE %d" % self.message_bytes_max]

    @property
    def can_encrypt(self) -> bool:
        return self.certificate is not None and self.tls is None

    async def encrypt(self) -> None:
        """Go on with TLS. Nothing that was said before counts any more (RFC 3207, 4.2).

        What the client sent behind STARTTLS was not encrypted: `start_tls` raises PeerError, which ends the request.
        """
        await self.say(b"220 2.0.0 begin")
        await self.read(start_tls(cert=self.certificate), timeout=HANDSHAKE_S)
        self.is_greeted, self.mail = False, None

    def begin(self, argument: bytes) -> bytes:
        found = re.fullmatch(rb"FROM: ?<([^<>\s]*)>((?: +\S+)*)", argument, re.IGNORECASE)
        if not self.is_greeted or self.mail is not None:
            return b"503 5.5.1 not now"
        if found is None:
            return b"501 5.5.4 say MAIL FROM:<address>"
        for parameter in found[2].split():
            name, _, value = parameter.partition(b"=")
            if name.upper() != b"SIZE" or not value.isdigit():
                return b"555 5.5.4 only SIZE is known here"
            if int(value[:20]) > self.message_bytes_max:
                return self.too_large()
        self.mail = Mail(found[1])
        return b"250 2.1.0 so be it"

    def add_recipient(self, argument: bytes) -> bytes:
        found = re.fullmatch(rb"TO: ?<([^<>\s]+)>", argument, re.IGNORECASE)
        if self.mail is None:
            return b"503 5.5.1 MAIL comes first"
        if found is None:
            return b"501 5.5.4 say RCPT TO:<address>"
        if len(self.mail.recipients) == RECIPIENTS_MAX:
            return b"452 4.5.3 too many recipients"
        self.mail.recipients.append(found[1])
        return b"250 2.1.5 so be it"

    async def receive(self) -> bytes:
        """Receive a message, and deliver it. Of a message that is too large, only the length is kept."""
        if self.mail is None or not self.mail.recipients:
            return b"503 5.5.1 RCPT comes first"
        await self.say(b"354 end with a dot in a line of its own")
        mail, self.mail = self.mail, None
        data, size, is_clean = bytearray(), 0, True
        while (text := await self.read(until(b"\r\n"), timeout=COMMAND_S)) != b".\r\n":
            text = text.removeprefix(b".")
            size += len(text)
            # Servers differ in what a CR or LF alone means: two of them could see a message end at different places.
            is_clean = is_clean and not re.search(rb"[\r\n]", text[:-2])
            if size <= self.message_bytes_max:
                data += text
            else:
                data.clear()
        if size > self.message_bytes_max:
            return self.too_large()
        if not is_clean:
            return b"554 5.6.0 lines end with CR LF, and both are nowhere else"
        mail.data = bytes(data)
        return await self.deliver(mail)

    def too_large(self) -> bytes:
        return b"552 5.3.4 a message has at most %d bytes" % self.message_bytes_max


class Relay(MailServer):
    """Passes each message on to the next server."""

    next_server: ClassVar[str] = os.environ.get("SMTP_NEXT", "tcp://127.0.0.1:1025")
    next_ca: ClassVar[str | None] = os.environ.get("SMTP_NEXT_CA")

    async def deliver(self, mail: Mail) -> bytes:
        try:
            lines = await self.forward(mail)
        except Refused as refusal:
            lines = refusal.lines
        except (OSError, PeerError) as error:  # it can't be reached, breaks off, is too slow, or talks nonsense
            log.warning("%s: a message was not forwarded: %s", self.next_server, error)
            lines = [b"451 4.4.1 the next server can't take the message now: try again later"]
        return b"\r\n".join(lines)

    async def forward(self, mail: Mail) -> list[bytes]:
        """Forward a message. Returns the last answer of the next server."""
        upstream: Connection = await self.read(connect(self.next_server))
        try:
            await self.answer_of(upstream, b"2")
            offers = await self.greet(upstream)
            if b"STARTTLS" in offers:
                await self.ask(upstream, b"STARTTLS")
                await self.read(upstream.start_tls(ca=self.next_ca), timeout=HANDSHAKE_S)
                offers = await self.greet(upstream)
            size = b" SIZE=%d" % len(mail.data) if b"SIZE" in offers else b""
            await self.ask(upstream, b"MAIL FROM:<%b>%b" % (mail.sender, size))
            for recipient in mail.recipients:  # if one is refused, the whole message is
                await self.ask(upstream, b"RCPT TO:<%b>" % recipient)
            await self.ask(upstream, b"DATA", expected=b"3")
            answer = await self.ask(upstream, re.sub(rb"(?m)^\.", b"..", mail.data) + b".")
            with contextlib.suppress(OSError):  # the next server has the message: nothing else matters
                upstream.send(b"QUIT\r\n")
                await self.read(upstream.flushed())
            return answer
        finally:
            upstream.close()

    async def greet(self, upstream: Connection) -> set[bytes]:
        """Say EHLO to the next server. Returns the extensions that it offers."""
        lines = await self.ask(upstream, b"EHLO " + NAME)
        return {each[4:].partition(b" ")[0].upper() for each in lines[1:]}

    async def ask(self, upstream: Connection, command: bytes, expected: bytes = b"2") -> list[bytes]:
        """Send a command to the next server, and return its answer."""
        await upstream.send(command + b"\r\n")
        return await self.answer_of(upstream, expected)

    async def answer_of(self, upstream: Connection, expected: bytes) -> list[bytes]:
        """Return the lines of the next server's answer. Raises Refused if its code says no."""
        lines: list[bytes] = []
        while not lines or lines[-1][3:4] == b"-":
            text = await self.read(upstream.line(COMMAND_BYTES_MAX), timeout=COMMAND_S)
            if not text.endswith(b"\n") or not text[:3].isdigit() or len(lines) == ANSWER_LINES_MAX:
                raise PeerError(f"an answer to SMTP can't begin with {text!r}" if text else "the connection has ended")
            lines.append(text.rstrip())
        if lines[-1][:1] in b"45":
            raise Refused(lines)
        if lines[-1][:1] != expected:
            raise PeerError(f"{lines[-1]!r} is no answer to that")
        return lines
