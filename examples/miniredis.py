"""A small Redis as a state machine: RESP2 with inline, multi-bulk and pipelined commands. CLIENT LIST reads the table.

    reqtable serve examples/miniredis.py:MiniRedis --bind tcp://127.0.0.1:6379
    redis-benchmark -t ping,set,get -n 100000 -P 16

All clients share the data, so don't use `--dispatch fork`: each child would have its own copy of the data, and no
client would see what another client sets.

Protocol: the RESP2 part of https://redis.io/docs/latest/develop/reference/protocol-spec/
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import ClassVar

from reqtable import LimitExceeded, StateRequestHandler, Transition, exactly, line, state
from reqtable.table.snapshot import Row

ARGUMENTS_MAX = 65_536
BULK_BYTES_MAX = 16 * 2**20

Value = bytes | deque[bytes]

OK = b"+OK\r\n"
NIL = b"$-1\r\n"


class CommandError(Exception):
    """Carries the error message that a client gets as the answer."""


class Store:
    """Holds the data: strings and lists, some of which expire."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.values: dict[bytes, Value] = {}
        self.expires_at: dict[bytes, float] = {}
        self.clock = clock
        self.lock = threading.Lock()  # some policies run commands in several threads

    def get(self, key: bytes) -> Value | None:
        if key in self.expires_at and self.expires_at[key] <= self.clock():
            self.delete(key)
        return self.values.get(key)

    def set(self, key: bytes, value: Value) -> None:
        self.values[key] = value
        self.expires_at.pop(key, None)

    def delete(self, key: bytes) -> bool:
        self.expires_at.pop(key, None)
        return self.values.pop(key, None) is not None


def integer(value: int) -> bytes:
    return b":%d\r\n" % value


def bulk(value: bytes | None) -> bytes:
    return NIL if value is None else b"$%d\r\n%b\r\n" % (len(value), value)


def array(values: list[bytes]) -> bytes:
    return b"*%d\r\n%b" % (len(values), b"".join(values))


def as_integer(text: bytes) -> int:
    try:
        return int(text)
    except ValueError:
        raise CommandError("value is not an integer or out of range") from None


class MiniRedis(StateRequestHandler):
    """Serves one client."""

    store: ClassVar[Store] = Store()

    arguments: list[bytes] = []  # noqa: RUF012  # each request has its own copy
    missing: int = 0  # how many arguments of this command have not arrived

    # -- the protocol -------------------------------------------------------------------------------------------------

    @state(line())
    def command(self, text: bytes) -> Transition:
        """Read an inline command, or the number of arguments of a multi-bulk command."""
        if text[:1] != b"*":
            self.arguments = text.split()
            return self.execute() if self.arguments else self.command
        count = text[1:].strip()
        if not count.isdigit() or int(count) > ARGUMENTS_MAX:
            return self.refuse(b"invalid multibulk length")
        self.missing = int(count)
        self.arguments = []
        return self.length if self.missing else self.command

    @state(line())
    def length(self, text: bytes) -> Transition:
        """Read the length of the next argument."""
        size = text[1:].strip()
        if text[:1] != b"$" or not size.isdigit() or int(size) > BULK_BYTES_MAX:
            return self.refuse(b"invalid bulk length")
        return self.argument, exactly(int(size) + 2)

    @state()
    def argument(self, value: bytes) -> Transition:
        """Read an argument and its line end."""
        self.arguments.append(value[:-2])
        self.missing -= 1
        return self.length if self.missing else self.execute()

    def on_limit(self, error: LimitExceeded) -> Transition:
        return self.refuse(b"too big inline request")

    def refuse(self, why: bytes) -> Transition:
        """Report a protocol error and close the connection: the rest of the input makes no sense."""
        self.send(b"-ERR Protocol error: %b\r\n" % why)

    def execute(self) -> Transition:
        name = self.arguments[0].upper()
        method = COMMANDS.get(name)
        try:
            if method is None:
                raise CommandError(f"unknown command '{name.decode('ascii', 'replace')}'")
            least, most, run = method
            if not least <= len(self.arguments) - 1 <= most:
                raise CommandError(f"wrong number of arguments for '{name.decode().lower()}' command")
            with self.store.lock:
                answer = run(self, *self.arguments[1:])
        except CommandError as error:
            text = str(error)
            answer = f"-{text if text.startswith('WRONGTYPE') else 'ERR ' + text}\r\n".encode()
        if answer is None:
            self.send(OK)
            return None
        self.send(answer)
        return self.command

    # -- the commands: each returns its answer; None means OK, and closes the connection -----------------------------

    def ping(self, message: bytes | None = None) -> bytes:
        return b"+PONG\r\n" if message is None else bulk(message)

    def echo(self, message: bytes) -> bytes:
        return bulk(message)

    def string(self, key: bytes) -> bytes | None:
        value = self.store.get(key)
        if isinstance(value, deque):
            raise CommandError("WRONGTYPE Operation against a key holding the wrong kind of value")
        return value

    def get(self, key: bytes) -> bytes:
        return bulk(self.string(key))

    def set(self, key: bytes, value: bytes, *options: bytes) -> bytes:
        words = [each.upper() for each in options]
        expires: float | None = None
        while words:
            option = words.pop(0)
            if option in (b"EX", b"PX") and words:
                expires = as_integer(words.pop(0)) / (1 if option == b"EX" else 1000)
                if expires <= 0:
                    raise CommandError("invalid expire time in 'set' command")
            elif option in (b"NX", b"XX"):
                if (self.store.get(key) is None) != (option == b"NX"):
                    return NIL
            else:
                raise CommandError("syntax error")
        self.store.set(key, value)
        if expires is not None:
            self.store.expires_at[key] = self.store.clock() + expires
        return OK

    def delete(self, *keys: bytes) -> bytes:
        return integer(sum(self.store.get(key) is not None and self.store.delete(key) for key in keys))

    def exists(self, *keys: bytes) -> bytes:
        return integer(sum(self.store.get(key) is not None for key in keys))

    def incr(self, key: bytes, by: bytes = b"1") -> bytes:
        value = as_integer(self.string(key) or b"0") + as_integer(by)
        self.store.values[key] = b"%d" % value  # keeps the time when the key expires
        return integer(value)

    def expire(self, key: bytes, seconds: bytes) -> bytes:
        delay = as_integer(seconds)
        if self.store.get(key) is None:
            return integer(0)
        self.store.expires_at[key] = self.store.clock() + delay
        return integer(1)

    def ttl(self, key: bytes) -> bytes:
        if self.store.get(key) is None:
            return integer(-2)
        at = self.store.expires_at.get(key)
        return integer(-1 if at is None else round(at - self.store.clock()))

    def mset(self, *pairs: bytes) -> bytes:
        if len(pairs) % 2:
            raise CommandError("wrong number of arguments for 'mset' command")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            self.store.set(key, value)
        return OK

    def mget(self, *keys: bytes) -> bytes:
        values = [self.store.get(key) for key in keys]
        return array([bulk(None if isinstance(value, deque) else value) for value in values])

    def items(self, key: bytes) -> deque[bytes] | None:
        value = self.store.get(key)
        if isinstance(value, bytes):
            raise CommandError("WRONGTYPE Operation against a key holding the wrong kind of value")
        return value

    def lpush(self, key: bytes, *values: bytes) -> bytes:
        items = self.items(key)
        if items is None:
            self.store.set(key, items := deque())
        items.extendleft(values)
        return integer(len(items))

    def lrange(self, key: bytes, first: bytes, last: bytes) -> bytes:
        items = self.items(key) or deque()
        start, stop = as_integer(first), as_integer(last)
        start = max(0, start + len(items) if start < 0 else start)
        stop = stop + len(items) if stop < 0 else stop
        return array([bulk(each) for each in islice(items, start, max(start, stop + 1))])

    def config(self, verb: bytes, *names: bytes) -> bytes:
        if verb.upper() != b"GET":
            raise CommandError("CONFIG knows GET only")
        return array([bulk(part) for name in names for part in (name, b"")])

    def command_table(self, *arguments: bytes) -> bytes:
        return array([])

    def info(self, *sections: bytes) -> bytes:
        lines = ["# Server", "redis_version:reqtable", "# Clients", f"connected_clients:{len(self.server.table)}"]
        lines += ["# Keyspace", f"db0:keys={len(self.store.values)},expires={len(self.store.expires_at)}"]
        return bulk("\r\n".join(lines).encode() + b"\r\n")

    def client(self, verb: bytes, *arguments: bytes) -> bytes | None:
        what = verb.upper()
        if what == b"LIST":
            return bulk("".join(map(client_line, self.server.table.snapshot())).encode())
        if what == b"ID":
            return integer(self.entry.id)
        if what in (b"SETINFO", b"SETNAME"):
            return OK
        if what == b"KILL":
            return self.kill(*arguments)
        raise CommandError("CLIENT knows LIST, KILL, ID, SETINFO and SETNAME only")

    def kill(self, *arguments: bytes) -> bytes | None:
        """Execute `CLIENT KILL addr:port`, `CLIENT KILL ID n` or `CLIENT KILL ADDR addr:port`."""
        table = self.server.table
        by_id = len(arguments) == 2 and arguments[0].upper() == b"ID"
        if by_id:
            victims = [as_integer(arguments[1])]
        else:
            victims = [row["id"] for row in table.snapshot(peer=arguments[-1].decode("ascii", "replace"))]
        himself = self.entry.id in victims
        count = himself + sum(table.cancel(id) for id in victims if id != self.entry.id)
        if len(arguments) == 1 and not count:
            raise CommandError("No such client")
        if himself:
            return None
        return OK if len(arguments) == 1 else integer(count)

    def quit(self) -> None:
        return None


def client_line(row: Row) -> str:
    """Format a row of the request table as Redis does."""
    return (
        f"id={row['id']} addr={row['peer']} laddr={row['local']} fd=-1 name= age={row['age_s']:.0f} "
        f"idle={row['idle_s']:.0f} flags=N db=0 qbuf={row['buffered_in']} omem={row['buffered_out']} "
        f"tot-net-in={row['bytes_in']} tot-net-out={row['bytes_out']} state={row['state']} steps={row['steps']}\n"
    )


MANY = ARGUMENTS_MAX

# name: (least arguments, most arguments, method)
COMMANDS: dict[bytes, tuple[int, int, Callable[..., bytes | None]]] = {
    b"PING": (0, 1, MiniRedis.ping),
    b"ECHO": (1, 1, MiniRedis.echo),
    b"SET": (2, 6, MiniRedis.set),
    b"GET": (1, 1, MiniRedis.get),
    b"DEL": (1, MANY, MiniRedis.delete),
    b"EXISTS": (1, MANY, MiniRedis.exists),
    b"INCR": (1, 1, MiniRedis.incr),
    b"INCRBY": (2, 2, MiniRedis.incr),
    b"EXPIRE": (2, 2, MiniRedis.expire),
    b"TTL": (1, 1, MiniRedis.ttl),
    b"MSET": (2, MANY, MiniRedis.mset),
    b"MGET": (1, MANY, MiniRedis.mget),
    b"LPUSH": (2, MANY, MiniRedis.lpush),
    b"LRANGE": (3, 3, MiniRedis.lrange),
    b"CONFIG": (2, MANY, MiniRedis.config),
    b"COMMAND": (0, MANY, MiniRedis.command_table),
    b"CLIENT": (1, MANY, MiniRedis.client),
    b"INFO": (0, MANY, MiniRedis.info),
    b"QUIT": (0, 0, MiniRedis.quit),
}
