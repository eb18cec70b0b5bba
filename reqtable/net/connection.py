"""`connect`, which opens an outgoing connection, and `Connection`: what a handler has of that connection."""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from typing import Any, BinaryIO, Protocol, TypeVar

from reqtable.net.files import size_of
from reqtable.net.sockets import is_tls
from reqtable.table import wants
from reqtable.table.arguments import check_timeout
from reqtable.table.connecting import ClientTLS, Connect, StartTLS, parse_target
from reqtable.table.connection import ConnectionRow
from reqtable.table.errors import HandlerError, LimitExceeded
from reqtable.table.input import Parse
from reqtable.table.output import END, FileSlice
from reqtable.table.reaching import OfConnection, failure_of, not_own
from reqtable.table.room import DONE, Room
from reqtable.table.states import Event, State
from reqtable.table.want import Want, WantOf

T = TypeVar("T")


class Keeper(Protocol):
    """Closes connections, and keeps those that can be used again."""

    def close_row(self, row: ConnectionRow) -> None: ...
    def keep(self, row: ConnectionRow) -> None: ...


class Connection:
    """Talks to another service. A request opens it with `connect`, and it ends with its request.

    It has many methods, because it has those of a handler's own connection: each is a want, or an action.

    The wants have the arguments and items of the functions of the same names. They are for the request that has opened
    the connection. At the end of file, `line`, `chunk` and `rest` give the remaining bytes, and then `b""`, once.
    `until` and `exactly` raise IncompleteRead. An error has this connection as its attribute `connection`.

    Using the connection raises HandlerError after `release()`, `close()` or the end of its request, and in a step of
    another request. A second `close()` does nothing.
    """

    __slots__ = ("keeper", "posted", "queued", "row")

    def __init__(self, row: ConnectionRow, keeper: Keeper) -> None:
        # What another thread has posted, and what of it the loop has queued: bytes, and one more for each piece.
        self.posted = self.queued = 0
        self.row = row  # its row in the table
        self.keeper = keeper  # of the table that its row is in

    def __repr__(self) -> str:
        return f"<Connection {self.row.id} to {self.row.address}>"

    def __reduce__(self) -> Any:
        raise TypeError(f"{self!r} can't be shipped to another process: use it in states that run on the loop")

    @property
    def id(self) -> int:
        """The id of its row in the table."""
        return self.row.id

    @property
    def address(self) -> str:
        """The address that was given to `connect`."""
        return self.row.address

    @property
    def peer(self) -> Any:
        """The address of the other end, in the form of the socket module."""
        return self.row.peer

    @property
    def local(self) -> Any:
        """The address of this end, in the form of the socket module."""
        return self.row.local

    @property
    def tls(self) -> Any:
        """Its `ssl.SSLSocket`, for `getpeercert()` and `selected_alpn_protocol()`; None without TLS."""
        request = self.row.transport.request
        return request if is_tls(request) else None

    # -- wants --------------------------------------------------------------------------------------------------------

    def line(self, limit: int = wants.LIMIT_BYTES) -> WantOf[bytes]:
        """Wait for a line of this connection, as `line` does."""
        return self._of(wants.line(limit))

    def until(self, separator: bytes, limit: int = wants.LIMIT_BYTES) -> WantOf[bytes]:
        """Wait for the bytes up to and including `separator`, as `until` does."""
        return self._of(wants.until(separator, limit))

    def exactly(self, n: int) -> WantOf[bytes]:
        """Wait for exactly `n` bytes, as `exactly` does."""
        return self._of(wants.exactly(n))

    def chunk(self, limit: int = wants.LIMIT_BYTES) -> WantOf[bytes]:
        """Wait for input of any length, as `chunk` does."""
        return self._of(wants.chunk(limit))

    def rest(self, limit: int) -> WantOf[bytes]:
        """Wait for everything up to the end of file, as `rest` does."""
        return self._of(wants.rest(limit))

    def skip_line(self) -> WantOf[None]:
        """Throw away input up to and including the next newline, as `skip_line` does."""
        return self._of(wants.skip_line())

    def parsed(self, parse: Parse[T], limit: int = wants.LIMIT_BYTES) -> Want[T]:
        """Wait for a whole message, as `parsed` does."""
        return self._of(wants.parsed(parse, limit))

    def datagram(self) -> WantOf[bytes]:
        """Wait for the next datagram. For udp:// addresses."""
        return self._of(wants.datagram())

    def flushed(self) -> WantOf[None]:
        """Wait until the kernel has taken all output of this connection so far. The item is None."""
        return self._of(wants.flushed())

    def start_tls(
        self,
        *,
        verify: bool = True,
        ca: str | None = None,
        cert: str | None = None,
        key: str | None = None,
        server_name: str | None = None,
        alpn: tuple[str, ...] = (),
        context: Any = None,
    ) -> WantOf[None]:
        """Encrypt the connection from here on (STARTTLS), as its client. The item is None.

        The options are those of `connect`. Queued output is sent before. Without a timeout, `connect_timeout_s` holds.
        The handler gets ConnectFailed if the handshake fails.
        """
        return StartTLS(ClientTLS(verify, ca, cert, key, server_name, alpn, context), self.row)

    # -- output -------------------------------------------------------------------------------------------------------

    def send(self, data: bytes | bytearray | memoryview) -> Any:
        """Queue output. In a coroutine, `await` suspends while more than `high_water_bytes` wait for the other side.

        Raises LimitExceeded if more than `output_bytes_max` bytes would wait, and TypeError for anything but bytes.
        """
        if type(data) is not bytes:
            if not isinstance(data, bytes | bytearray | memoryview):
                raise TypeError(f"send() takes bytes, not {type(data).__name__}")
            data = bytes(data)  # a copy: the caller may change its own
        row = self._own()
        table, output, request = row.table, row.output, row.parent
        if output.held + self.posted - self.queued + len(data) > table.limits.output_bytes_max:
            error = LimitExceeded(f"untaken output to {row.address}", table.limits.output_bytes_max)
            error.connection = self
            raise error
        if table.thread != get_ident() and table.thread is not None:
            _post(self, data, len(data))
        elif table.running is request and output.first is None and data:  # fast path of _queue
            output.first = data
            output.size = output.held = len(data)
            table.touched.append(row)
        else:
            _queue(self, data)
        if request is None or not request.handler._awaits:
            return None
        return DONE if output.held <= table.limits.high_water_bytes else Room(self.flushed(), warns=False)

    def send_file(self, file: BinaryIO, offset: int = 0, count: int | None = None) -> None:
        """Queue `count` bytes of `file` from `offset`, as the handler's `send_file` does, with the same errors."""
        if count is None:
            count = size_of(file) - offset
        if offset < 0 or count < 0:
            raise ValueError(f"send_file() can't send {count} bytes from offset {offset}")
        self._own()
        if count:
            _put(self, FileSlice(file, offset, count))

    def end_output(self) -> None:
        """End the output after what is queued: the other side sees end of file, and may go on sending.

        Raises HandlerError for datagrams.
        """
        row = self._own(ended_is_fine=True)
        if not row.input.is_stream:
            raise HandlerError(f"end_output() of {row.address}: each datagram is whole by itself")
        if not row.output_ended:
            row.output_ended = True
            _put(self, END)

    def close(self) -> None:
        """Close the connection at once, and drop its unsent output and its unread input."""
        if self.row.connection is self and self.row.parent is not None:
            self._check_user()
            _leave(self, self.keeper.close_row)

    def release(self) -> None:
        """Give the connection back: a later `connect(…, reuse=True)` to the same address may take it.

        The connection is closed instead if it has unread input or unsent output, if one side has ended its output, or
        if `start_tls` has encrypted the connection.
        """
        self._own(ended_is_fine=True)
        _leave(self, self.keeper.keep)

    def _own(self, ended_is_fine: bool = False) -> ConnectionRow:
        """Return the row if the connection may be used. Raises HandlerError, or what has ended the connection."""
        row = self.row
        if row.connection is not self or row.parent is None:
            raise HandlerError(not_own(row, True))
        if row.failure is not None:
            raise failure_of(row)
        if row.output_ended and not ended_is_fine:
            raise HandlerError(f"the output to {row.address} was ended with end_output(): nothing can follow")
        if row.table.running is not row.parent:
            self._check_user()
        return row

    def _check_user(self) -> None:
        """Raise HandlerError if the step of another request is running in this thread."""
        row, thread = self.row, get_ident()
        table = row.table
        if table.thread is None or table.thread == thread:
            user = table.running
        else:
            user = next((each for each, step in table.elsewhere.items() if step.thread == thread), None)
        if user is not None and user is not row.parent:
            raise HandlerError(not_own(row, False))

    def _of(self, want: Want[T]) -> WantOf[T]:
        """Return the want of this connection. Raises HandlerError for a stream's want of datagrams."""
        row = self.row
        if not row.input.is_stream and type(want) is not wants.Datagram and want.awaits is Event.AWAITS_INPUT:
            raise HandlerError(f"{row.address} brings datagrams, not a stream: wait for datagram()")
        if row.input.is_stream and type(want) is wants.Datagram:
            raise HandlerError(f"{row.address} is a stream: wait for line(), exactly(), chunk() and the like")
        return OfConnection(want, row)


def connect(
    address: str,
    *,
    timeout: float | None = None,
    reuse: bool = False,
    verify: bool = True,
    ca: str | None = None,
    cert: str | None = None,
    key: str | None = None,
    server_name: str | None = None,
    alpn: tuple[str, ...] = (),
    context: Any = None,
) -> WantOf[Connection]:
    """Open a connection to another service. The item is a `Connection`.

    `address` is `tcp://host:port`, `tls://host:port`, `udp://host:port` or `unix:///path`. `timeout` is in seconds, for
    the name look-up, all addresses and TLS together; None: `connect_timeout_s`. If `reuse` is true, a connection to
    the same address that was released is taken.

    The other options are for `tls://` addresses. Files are PEM files. `verify`: check the certificate of the other
    side, by the certificates in `ca` (None: those of the system). `server_name` is the name that the certificate must
    have (None: the host of the address). `cert` and `key` are the certificate and the key of this side. `alpn` has the
    protocols to offer, the preferred one first (RFC 7301). An `ssl.SSLContext` in `context` replaces all of these
    options but `server_name`.

    The addresses of a name are tried in turn (RFC 8305). The handler gets ConnectFailed if the connection can't be
    made. Raises TypeError or ValueError for an address, a timeout or an option of TLS that can't be used.
    """
    if not isinstance(address, str):
        raise TypeError(f"connect() takes an address such as 'tcp://127.0.0.1:9000', not {address!r}")
    if timeout is not None:
        check_timeout(timeout)
    target = parse_target(address)
    tls = None
    if target.scheme == "tls":
        tls = ClientTLS(verify, ca, cert, key, server_name, alpn, context)
    elif not verify or ca or cert or key or server_name or alpn or context:
        raise ValueError(f"{address}: options of TLS are for tls:// addresses, and for start_tls()")
    return Connect(target, timeout, bool(reuse), tls)


# What a step in another thread does with a connection, the loop does for it: in the same order, before it sees the
# outcome of the step.


def _put(connection: Connection, piece: Any) -> None:
    """Queue a piece of output. In another thread than the loop's, have the loop queue it, after earlier pieces."""
    table = connection.row.table
    if table.thread is None or table.thread == get_ident():
        _queue(connection, piece)
    else:
        _post(connection, piece, 0)


def _post(connection: Connection, piece: Any, size: int) -> None:
    connection.posted += size + 1
    owner: Any = connection.row.table.owner  # a loop runs: it has an owner
    owner.post(_take_post, connection, piece, size)


def _take_post(connection: Connection, piece: Any, size: int) -> None:
    connection.queued += size + 1
    _queue(connection, piece)


def _queue(connection: Connection, piece: Any) -> None:
    row = connection.row
    if row.state is not State.WAITING or row.connection is not connection or row.parent is None:
        return  # it has ended, or was given back
    if type(piece) is FileSlice:
        row.output.append_file(piece)
    elif piece is END:
        row.output.append_end()
    elif piece or not row.input.is_stream:
        row.output.append(piece)
    row.table.touched.append(row)


def _leave(connection: Connection, give_back: Callable[[ConnectionRow], None]) -> None:
    """Give the connection back. In another thread than the loop's, have the loop do it, after what was sent."""
    row = connection.row
    if row.table.thread is None or row.table.thread == get_ident():
        give_back(row)
        return
    row.connection = None  # from now on this object can't be used

    def leave() -> None:
        if row.parent is not None and row.failure is None:  # otherwise it has ended meanwhile
            give_back(row)

    owner: Any = row.table.owner
    owner.post(leave)
