"""Asks the control API of a running server: HTTP over a Unix socket, and one-line errors."""

from __future__ import annotations

import errno
import functools
import http.client
import json
import os
import pwd
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import click

from reqtable.control.workers import ANSWER_S as WORKER_S
from reqtable.run.commands import shown
from reqtable.run.commands.finding import CouldNotAsk, Found, SeveralRun, found_server, listener_of, path_of
from reqtable.run.commands.stuck import stuck_in
from reqtable.run.operated import CONTROL_VARIABLE
from reqtable.table.errors import ConfigurationError

ANSWER_S = 5.0  # how long a server may take to answer
_USAGE_STATUS = 400
_NOT_FOUND = 404
_READ_BYTES = 65_536


class Connection(http.client.HTTPConnection):
    """Connects to a Unix socket. Knows the process that listens there."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("reqtable", timeout=timeout)
        self.path = path
        self.pid: int | None = None

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        try:
            self.sock.connect(self.path)
        except BaseException:
            self.sock.close()
            raise
        self.pid = listener_of(self.sock)


class Asked:
    """The server that a command asks. Raises ClickException, or UsageError, with one line for what goes wrong."""

    def __init__(self, named: str | None, timeout_s: float = ANSWER_S) -> None:
        self._named = named
        self._timeout_s = timeout_s
        self._may_lack_workers = False

    @functools.cached_property
    def path(self) -> str:
        """The path of the control socket."""
        return path_of(self._named, _addresses_of) if self._named else self._found.path

    @functools.cached_property
    def _found(self) -> Found:
        return found_server()

    def tell_found(self) -> None:
        """If no server was named, say on standard error which one was found: the command changes it."""
        if not self._named:
            named = [f"{shown.text(each['handler'])} at {shown.text(each['address'])}" for each in self.served()]
            process = f"process {self._found.pid}" if named else f"process {self._found.pid}: no worker answers"
            click.echo(f"the only server is {', '.join([*named, process])}", err=True)

    def served(self) -> list[Any]:
        """Return what the server serves, as a list of mappings with a `handler` and an `address`.

        The list is empty if the server has workers, but none answers.
        """
        found: list[Any] = self.get("/v1/stats")["servers"]
        return found

    def wait_at_most(self, seconds: float) -> None:
        """From now on, give the server so many seconds for an answer."""
        self._timeout_s = seconds

    def get(self, place: str, **query: Any) -> Any:
        """Return the answer to a GET."""
        return json.loads(self.octets(place, **query))

    def octets(self, place: str, **query: Any) -> bytes:
        """Return the answer to a GET as it is."""
        return b"".join(self._answer("GET", _with(place, query)))

    def find(self, place: str) -> Any:
        """Return the answer to a GET; None if the server has no such thing."""
        found = json.loads(b"".join(self._answer("GET", place, also=_NOT_FOUND)))
        return None if found.keys() == {"error"} else found

    def limit_s(self, name: str) -> float:
        """Return a limit of the server in seconds; inf if there is none."""
        [value] = [each["value"] for each in self.get("/v1/config") if each["key"] == f"limits.{name}"]
        return inf if value is None else float(value)  # JSON has no number for it

    def send(self, method: str, place: str, body: Mapping[str, Any], also: int | None = None) -> Any:
        """Return the answer to a request with a body. The status `also` is no error."""
        return json.loads(b"".join(self._answer(method, place, json.dumps(body).encode(), also)))

    def lines(self, place: str, *, is_endless: bool = False, **query: Any) -> Iterator[bytes]:
        """Yield the lines of an answer as they come. An endless one may have nothing to say for any time."""
        return _split(self._answer("GET", _with(place, query), is_endless=is_endless))

    def send_for_lines(self, method: str, place: str, body: Mapping[str, Any]) -> Iterator[bytes]:
        """Yield the lines of the answer to a request with a body as they come."""
        return _split(self._answer(method, _with(place, {"format": "ndjson"}), json.dumps(body).encode()))

    def tell_missing(self) -> None:
        """If an answer took as long as a worker may take, say on standard error which workers it lacks."""
        if self._may_lack_workers:
            with suppress(click.ClickException):  # the server has ended meanwhile
                for each in stuck_in(self.get("/v1/workers")):
                    text = f"worker {each['worker']} is stuck, and has no part in this answer: see reqtable workers"
                    click.echo(text, err=True)

    def _answer(
        self, method: str, place: str, body: bytes | None = None, also: int | None = None, is_endless: bool = False
    ) -> Iterator[bytes]:
        connection = Connection(self.path, self._timeout_s)
        began = time.monotonic()
        try:
            connection.request(method, place, body)
            response = connection.getresponse()
            if place == "/v1/workers":
                self._may_lack_workers = False  # it names the stuck ones itself
            else:
                self._may_lack_workers |= time.monotonic() - began > WORKER_S
            if response.status >= _USAGE_STATUS and response.status != also:
                raise _refusal(response, place)
            if is_endless:
                connection.sock.settimeout(None)
            while data := response.read1(_READ_BYTES):
                yield data
            if response.length:
                raise http.client.IncompleteRead(b"")
        except TimeoutError:
            later = "" if method == "GET" else "; what was asked for may still be done"
            raise CouldNotAsk(f"{self.path}: {_held_up(connection.pid, self._timeout_s)}{later}") from None
        except OSError as error:
            raise CouldNotAsk(f"{self.path}: {_why(self.path, error, self._timeout_s)}") from None
        except http.client.HTTPException:
            raise CouldNotAsk(f"{self.path}: the server has ended while it answered") from None
        finally:
            connection.close()


def _addresses_of(path: str) -> list[str]:
    """Return where the server listens whose control socket is at `path`; nothing if it does not answer."""
    try:
        return [each["address"] for each in Asked(path).served()]
    except click.ClickException:
        return []


def _with(place: str, query: Mapping[str, Any]) -> str:
    words = urlencode({name: value for name, value in query.items() if value is not None})
    return f"{place}?{words}" if words else place


def _split(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the lines of what comes in pieces, without their ends."""
    begun = b""
    for data in pieces:
        *lines, begun = (begun + data).split(b"\n")
        yield from lines
    if begun:
        yield begun


def _refusal(response: http.client.HTTPResponse, place: str) -> Exception:
    """Return the error that the server has answered with."""
    text = response.read().decode("utf-8", "replace")
    try:
        text = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        text = text or response.reason
    if place in ("/v1/config", "/v1/reload"):
        return ConfigurationError(text)
    return (click.UsageError if response.status == _USAGE_STATUS else click.ClickException)(text)


def _why(path: str, error: OSError, timeout_s: float) -> str:
    if error.errno == errno.ENOENT:
        return "there is no such socket: the server has ended, or has another one"
    if error.errno == errno.ECONNREFUSED:
        if not Path(path).is_socket():
            return "this is no socket, but another file: name the control socket of a server"
        return "no server listens there any more: it has ended without removing its socket"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"permission refused{_owner(path)}: ask as that user, or as root"
    if error.errno == errno.EAGAIN:  # its queue of connections is full
        return _held_up(None, timeout_s)
    if isinstance(error, ConnectionError):
        return "the server closed the connection: it is ending, or belongs to another user"
    return error.strerror or str(error)


def _owner(path: str) -> str:
    for place in (path, os.path.dirname(path)):
        try:
            user = os.stat(place).st_uid
        except OSError:
            continue
        try:
            return f": it belongs to user {pwd.getpwuid(user).pw_name}"
        except KeyError:
            return f": it belongs to user {user}"
    return ""


def _held_up(pid: int | None, timeout_s: float) -> str:
    text = f"the server does not answer within {timeout_s:g} s: its loop is held up"
    if pid is None:
        return text
    if _handles(pid, signal.SIGUSR1):
        return f"{text}: kill -USR1 {pid} logs its table"
    return f"{text}, in process {pid}"


def _handles(pid: int, number: int) -> bool:
    """Return whether a process has a handler for a signal, which would end it otherwise (proc(5))."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = [line.split()[1] for line in text.splitlines() if line.startswith("SigCgt:")]
    return bool(caught) and bool(int(caught[0], 16) >> (number - 1) & 1)


class _Named(click.Path):
    """A server, of which the shell completes the path. The variable names one, with any colon in it: `:7000`."""

    envvar_list_splitter = "\0"  # no variable has it


def control_option(**given: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return the option `--control`."""
    return click.option("--control", metavar="SERVER", envvar=CONTROL_VARIABLE, type=_Named(readable=False), **given)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def asks(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options `--control` and `--json`, and the arguments `server` and `as_json`.

    At its end the command says which workers its answers lack.
    """

    @control_option(
        help="The server: its control socket, its process, or :PORT of a bind. By default "
        f"${CONTROL_VARIABLE}, or the only server."
    )
    @json_option
    @functools.wraps(command)
    def run(*args: Any, control: str | None, **given: Any) -> Any:
        server = Asked(control)
        try:
            return command(*args, server=server, **given)
        except SeveralRun as error:
            for each in error.servers:
                click.echo(f"{each.pid}  {each.path}  {each.command}", err=True)
            raise
        finally:
            server.tell_missing()

    return run


def print_json(data: Any) -> None:
    """Print plain data as JSON in ASCII, so that nothing that a client sent reaches the terminal as it is."""
    click.echo(json.dumps(data))


def print_json_array(items: Iterator[Any]) -> None:
    """Print items as a JSON array, one line each, as they come."""
    separator = "["
    for each in items:
        click.echo(separator + json.dumps(each), nl=False)
        separator = ",\n"
    click.echo("[]" if separator == "[" else "]")
    sys.stdout.flush()


def confirm(question: str) -> None:
    """Ask, and end the command unless the answer is yes."""
    try:
        is_sure = click.confirm(question, err=True)
    except click.Abort:  # the end of the input, or Ctrl-C
        raise click.ClickException(
            "there was no answer, so none was ended: use --yes where nobody can answer"
        ) from None
    if not is_sure:
        raise click.Abort
