"""`reqtable talk`: a small client for a server of lines."""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Callable
from ssl import SSLCertVerificationError, SSLError

import click

from reqtable.run.commands.asking import Asked
from reqtable.run.commands.finding import CouldNotAsk, SeveralRun, found_server
from reqtable.run.talking import Talk, Where, in_lines, talk_to_person
from reqtable.table.addresses import printable


class _NotConnected(click.ClickException):
    exit_code = 2


@click.command("talk", short_help="Send lines to a server, and show its answers.")
@click.argument("address", required=False)
@click.option("--crlf", is_flag=True, help="End each line by CR LF, as HTTP and SMTP do.")
@click.option("--hex", "as_hex", is_flag=True, help="Read and show bytes as hexadecimal digits.")
@click.option("--insecure", is_flag=True, help="With tls://, accept any certificate.")
def talk_command(address: str | None, crlf: bool, as_hex: bool, insecure: bool) -> None:
    """Connect to ADDRESS, send the lines that you type, and show at once what comes back.

    ADDRESS is tcp://HOST:PORT, tls://HOST:PORT, unix:///PATH or HOST:PORT; without it, the only bind of the only server
    that is running. Ctrl-D ends your half of the connection, Ctrl-C ends the command. If standard input is no terminal,
    all of it is sent, and the command ends when the server closes.
    """
    text = address or _only_bind()
    try:
        where = Where.read(text)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    try:
        own, tls = where.connect(insecure)
    except (OSError, UnicodeError) as error:
        raise _NotConnected(f"can't connect to {printable(text)}: {_why(error)}") from None
    is_person = sys.stdin is not None and sys.stdin.isatty()
    encode_line = _from_hex if as_hex else _with_crlf if crlf else (lambda line: line + b"\n")
    try:
        with own:
            if is_person:
                talk_to_person(own, encode_line, _show_hex if as_hex else Transcript().show, tls)
                click.echo("the server has closed the connection", err=True)
            else:
                encode = in_lines(encode_line) if crlf or as_hex else bytes
                Talk(own, _standard_input(), encode, _show_hex if as_hex else _show, tls).run()
    except KeyboardInterrupt:
        raise click.Abort from None
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except BrokenPipeError:
        raise
    except OSError as error:
        raise click.ClickException(f"{printable(text)}: {_why(error)}") from None


def _why(error: OSError | UnicodeError) -> str:
    if isinstance(error, UnicodeError):
        return "no name service can have a host of that name"
    if isinstance(error, SSLCertVerificationError):
        return f"the certificate is refused: {error.verify_message}: --insecure accepts any certificate"
    if isinstance(error, SSLError):
        if error.reason == "WRONG_VERSION_NUMBER":
            return "the server does not speak TLS there: write tcp:// in place of tls://"
        return f"TLS failed: {(error.reason or str(error)).replace('_', ' ').lower()}"
    return (getattr(error, "strerror", None) or str(error)).lower()


def _only_bind() -> str:
    """Return the address of the only bind of the only server that is running."""
    mend = "name the ADDRESS, such as tcp://127.0.0.1:7000"
    try:
        path = found_server().path
    except SeveralRun as error:
        raise click.UsageError(f"{len(error.servers)} servers are running: {mend}") from None
    except CouldNotAsk:
        raise click.UsageError(f"no server of this user is running: {mend}") from None
    addresses = [str(each["address"]) for each in Asked(path).served()]
    if not addresses:
        raise click.UsageError(f"no worker of the server answers: {mend}")
    if len(addresses) > 1:
        raise click.UsageError(f"the server has several binds: name one ADDRESS of {', '.join(addresses)}")
    return addresses[0]


def _standard_input() -> int:
    return os.open(os.devnull, os.O_RDONLY) if sys.stdin is None else sys.stdin.fileno()


def _with_crlf(line: bytes) -> bytes:
    """Return a line that ends by CR LF. One that was piped may have its CR already."""
    return line.removesuffix(b"\r") + b"\r\n"


def _from_hex(line: bytes) -> bytes:
    try:
        return bytes.fromhex(line.decode("ascii"))
    except ValueError:
        raise ValueError(f"not hexadecimal digits, such as 68 69 0a: {printable(line.decode('latin-1'))}") from None


def _show(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _show_hex(data: bytes) -> None:
    if data:
        _show(data.hex(" ").encode() + b"\n")


class Transcript:
    """Shows text above what the person is typing. The server's escape sequences have no effect."""

    def __init__(self) -> None:
        utf8 = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._decoder = io.IncrementalNewlineDecoder(utf8, translate=True)

    def show(self, data: bytes) -> None:
        """Show some bytes. A character or a line end may come in two pieces. No bytes: nothing follows."""
        text = self._decoder.decode(data, final=not data)
        safe = "".join(each if each in "\n\t" else printable(each) for each in text)
        typed = _typed()
        _show((f"\r\x1b[K{safe}{typed}" if typed and safe else safe).encode(sys.stdout.encoding, "backslashreplace"))


def _typed() -> str:
    readline = sys.modules.get("readline")
    found: Callable[[], str] = getattr(readline, "get_line_buffer", str)
    return found()
