"""A small Redis as a state machine: RESP2 with inline, multi-bulk and pipelined commands. CLIENT LIST reads the table.

    reqtable serve examples/miniredis.py:MiniRedis --bind tcp://127.0.0.1:6379
    redis-benchmark -t ping,set,get -n 100000 -P 16

Two commands wait for other clients: BLPOP for an item of a list, SUBSCRIBE for messages. The other client's request
gives an item to the waiting request with `tell`, and that request takes it with `told()`.

All clients share the data, so don't use `--dispatch fork`: each child would have its own copy of the data, and no
client would see what another client sets. `save_state` and `restore_state` keep the data, and what the clients wait
for, over a restart (`reqtable restart`).

Protocol: the RESP2 part of https://redis.io/docs/latest/develop/reference/protocol-spec/
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, ClassVar

from reqtable import (
    Arrived,
    LimitExceeded,
    PeerError,
    StateRequestHandler,
    Transition,
    disconnected,
    either,
    flushed,
    parsed,
    sleep,
    state,
    told,
)
from reqtable.table.snapshot import Row

ARGUMENTS_MAX = 65_536
BULK_BYTES_MAX = 16 * 2**20
LINE_BYTES_MAX = 65_536
COMMAND_BYTES_MAX = 4 * BULK_BYTES_MAX

Value = bytes | deque[bytes]

OK = b"+OK\r\n"
NIL = b"$-1\r\n"
NIL_ARRAY = b"*-1\r\n"


class CommandError(Exception):
    """Carries the error message that a client gets as the answer."""


class ProtocolError(PeerError):
    """The client has sent what is no command. The message is for the client."""


class Store:
    """Holds the data: strings and lists, some of which expire. Knows which clients wait for what."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.values: dict[bytes, Value] = {}
        self.expires_at: dict[bytes, float] = {}
        self.clock = clock
        self.lock = threading.RLock()  # some policies run commands in several threads; CLIENT KILL may call `on_close`
        self.waiting: dict[bytes, dict[MiniRedis, None]] = {}  # by key: who waits in BLPOP, the longest waiting first
        self.subscribers: dict[bytes, dict[MiniRedis, None]] = {}  # by channel

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

    def serve(self, key: bytes) -> None:
        """Give the items of a list to the clients that wait for them. Call this when items have come."""
        items = self.values.get(key)
        while isinstance(items, deque) and items and key in self.waiting:
            client = next(iter(self.waiting[key]))
            self.stop_waiting(client)
            if client.tell(items[0]):  # False: the client has gone
                client.given = key, items.popleft()
        if not items:
            self.delete(key)

    def stop_waiting(self, client: "MiniRedis") -> None:
        for key in client.keys:
            remove(self.waiting, key, client)
        client.keys = ()

    def take_back(self, client: "MiniRedis") -> None:
        """Put back the item that was given to a client that has left before the item was sent."""
        if client.given is not None:
            (key, item), client.given = client.given, None
            items = self.values.setdefault(key, deque())
            if isinstance(items, deque):
                items.appendleft(item)
                self.serve(key)


def integer(value: int) -> bytes:
    return b":%d\r\n" % value


def bulk(value: bytes | None) -> bytes:
    return NIL if value is None else b"$%d\r\n%b\r\n" % (len(value), value)


def array(values: list[bytes]) -> bytes:
    return b"*%d\r\n%b" % (len(values), b"".join(values))


def remove(clients: "dict[bytes, dict[MiniRedis, None]]", name: bytes, client: "MiniRedis") -> None:
    """Remove a client from those under `name`, and the name if no client is left."""
    there = clients.get(name, {})
    there.pop(client, None)
    if not there:
        clients.pop(name, None)


def ids_of(clients: "dict[bytes, dict[MiniRedis, None]]") -> dict[bytes, list[int]]:
    return {name: [each.entry.id for each in there] for name, there in clients.items()}


def clients_of(server: Any, ids: dict[bytes, list[int]]) -> "dict[bytes, dict[MiniRedis, None]]":
    """Return the clients with these ids. A client that could not move is not there."""
    entries = {name: [entry for id in each if (entry := server.table.get(id))] for name, each in ids.items()}
    return {name: {each.handler: None for each in there} for name, there in entries.items() if there}


def as_integer(text: bytes) -> int:
    try:
        return int(text)
    except ValueError:
        raise CommandError("value is not an integer or out of range") from None


def as_seconds(text: bytes) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise CommandError("timeout is not a float or out of range")
    if seconds < 0:
        raise CommandError("timeout is negative")
    return seconds


def whole_command(data: bytes) -> tuple[list[bytes], int] | int | None:
    """Return the arguments of the first command in `data`, and its length.

    If the command is incomplete, return how many bytes it needs at least, or None.
    """

    def number_after(mark: bytes, start: int, most: int, why: str) -> tuple[int, int]:
        end = data.index(b"\n", start) + 1
        digits = data[start + 1 : end].strip()
        if data[start : start + 1] != mark or not digits.isdigit() or int(digits) > most:
            raise ProtocolError(why)
        return int(digits), end

    end = 0
    try:
        if data[:1] != b"*":
            end = data.index(b"\n") + 1
            return data[:end].split(), end
        count, end = number_after(b"*", 0, ARGUMENTS_MAX, "invalid multibulk length")
        arguments = []
        for _ in range(count):
            size, start = number_after(b"$", end, BULK_BYTES_MAX, "invalid bulk length")
            end = start + size + 2
            arguments.append(data[start : end - 2])
    except ValueError:  # there is no line end yet
        if len(data) - end >= LINE_BYTES_MAX:
            raise ProtocolError("too big inline request") from None
        return end + 1
    return (arguments, end) if end <= len(data) else end


class MiniRedis(StateRequestHandler):
    """Serves one client."""

    store: ClassVar[Store] = Store()

    arguments: list[bytes] = []  # noqa: RUF012  # each request has its own copy
    channels: dict[bytes, None] = {}  # noqa: RUF012  # what the client has subscribed to
    keys: tuple[bytes, ...] = ()  # what the client waits for, in BLPOP
    given: tuple[bytes, bytes] | None = None  # the key and the item that it was told, until they are sent

    # -- a restart ----------------------------------------------------------------------------------------------------

    @classmethod
    def save_state(cls, server: Any) -> dict[str, Any]:  # noqa: ARG003
        """Return the data, and the ids of the clients that wait."""
        store = cls.store
        now = store.clock()
        return {
            "values": {key: list(each) if isinstance(each, deque) else each for key, each in store.values.items()},
            "expires_s": {key: at - now for key, at in store.expires_at.items()},
            "waiting": ids_of(store.waiting),
            "subscribers": ids_of(store.subscribers),
        }

    @classmethod
    def restore_state(cls, server: Any, data: dict[str, Any]) -> None:
        """Add the data to what is here: with workers, several old ones may give theirs to one new worker.

        The clients have the same ids as in the old process.
        """
        store = cls.store
        now = store.clock()
        for key, value in data["values"].items():
            store.set(key, deque(value) if isinstance(value, list) else value)
        store.expires_at |= {key: now + seconds for key, seconds in data["expires_s"].items()}
        for here, ids in ((store.waiting, data["waiting"]), (store.subscribers, data["subscribers"])):
            for name, clients in clients_of(server, ids).items():
                here.setdefault(name, {}).update(clients)

    # -- the protocol -------------------------------------------------------------------------------------------------

    @state(parsed(whole_command, COMMAND_BYTES_MAX))
    def command(self, arguments: list[bytes]) -> Transition:
        """Run a command, and send its answer."""
        self.arguments = arguments
        return self.execute() if arguments else self.command

    def on_limit(self, error: LimitExceeded) -> Transition:
        return self.refuse(b"too big inline request")

    def on_error(self, error: Exception) -> Transition:
        if isinstance(error, ProtocolError):
            return self.refuse(str(error).encode())
        raise error

    def refuse(self, why: bytes) -> Transition:
        """Report a protocol error and close the connection: the rest of the input makes no sense."""
        self.send(b"-ERR Protocol error: %b\r\n" % why)
        return None

    def execute(self) -> Transition:
        answer = self.answer()
        self.send(OK if answer is None else answer)
        if answer is None:
            return None
        if self.keys:
            return self.wait()
        return self.listen if self.channels else self.command

    def answer(self) -> bytes | None:
        """Run the command. Returns its answer."""
        name = self.arguments[0].upper()
        method = COMMANDS.get(name)
        try:
            if method is None:
                raise CommandError(f"unknown command '{name.decode('ascii', 'replace')}'")
            least, most, run = method
            if not least <= len(self.arguments) - 1 <= most:
                raise CommandError(f"wrong number of arguments for '{name.decode().lower()}' command")
            if self.channels and name not in WHILE_SUBSCRIBED:
                raise CommandError(f"Can't execute '{name.decode().lower()}': {ONLY}")
            with self.store.lock:
                return run(self, *self.arguments[1:])
        except CommandError as error:
            text = str(error)
            return f"-{text if text.startswith('WRONGTYPE') else 'ERR ' + text}\r\n".encode()

    # -- waiting for other clients ------------------------------------------------------------------------------------

    def wait(self) -> Transition:
        """Wait for an item, as BLPOP does: for so many seconds; 0: for ever."""
        seconds = as_seconds(self.arguments[-1])
        the_end = [sleep(seconds)] if seconds else []
        return self.popped, either(told(), disconnected(), *the_end)

    @state()
    def popped(self, arrived: Arrived) -> Transition:
        """Answer BLPOP: an item was given (0), the client has left (1), or the time is over (2)."""
        if arrived.index == 1:
            return None  # `on_close` puts back what was given in the meantime
        with self.store.lock:
            self.store.stop_waiting(self)
            if arrived.index == 2 and self.given is not None:
                return self.popped, either(told())  # it came at the last moment
        if self.given is None:
            self.send(NIL_ARRAY)
            return self.command
        self.send(array([bulk(part) for part in self.given]))
        return self.delivered

    @state(flushed())
    def delivered(self, _: None) -> Transition:
        """The item is on its way. Until now `on_close` would have put it back."""
        self.given = None
        return self.command

    @state(either(parsed(whole_command, COMMAND_BYTES_MAX), told()))
    def listen(self, arrived: Arrived) -> Transition:
        """Serve a client that has subscribed: read its next command, or send it a message."""
        if arrived.index == 1:
            return self.pass_on(arrived.item)
        self.arguments = arrived.item
        if not self.arguments:
            return self.listen
        answer = self.answer()
        if answer is None:
            self.send(OK)
            return None
        # The answer stays behind the messages that were published before it.
        if not self.tell((answer, not self.channels)):
            return None
        return self.listen if self.channels else self.pass_on

    @state(told())
    def pass_on(self, item: tuple[bytes, bool]) -> Transition:
        """Send a message or an answer. The last one says that the client has unsubscribed from everything."""
        data, is_last = item
        self.send(data)
        if is_last:
            return self.command
        return self.listen if self.channels else self.pass_on

    def on_close(self) -> None:
        with self.store.lock:
            self.store.stop_waiting(self)
            self.store.take_back(self)
            for channel in self.channels:
                remove(self.store.subscribers, channel, self)

    # -- the commands: each returns its answer; None means OK, and closes the connection -----------------------------

    def ping(self, message: bytes | None = None) -> bytes:
        if self.channels:
            return array([bulk(b"pong"), bulk(message or b"")])
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
        return self.push(key, deque.extendleft, values)

    def rpush(self, key: bytes, *values: bytes) -> bytes:
        return self.push(key, deque.extend, values)

    def push(
        self, key: bytes, extend: Callable[[deque[bytes], Iterable[bytes]], None], values: tuple[bytes, ...]
    ) -> bytes:
        items = self.items(key)
        if items is None:
            self.store.set(key, items := deque())
        extend(items, values)
        count = len(items)
        self.store.serve(key)
        return integer(count)

    def lpop(self, key: bytes) -> bytes:
        items = self.items(key)
        if not items:
            return NIL
        item = items.popleft()
        if not items:
            self.store.delete(key)
        return bulk(item)

    def blpop(self, *words: bytes) -> bytes:
        """Answer with an item of the first list that has one. If none has, the client waits: see `wait`."""
        *keys, timeout = words
        as_seconds(timeout)  # raises CommandError
        for key in keys:
            if self.items(key):
                return array([bulk(key), self.lpop(key)])
        self.keys = tuple(keys)
        for key in keys:
            self.store.waiting.setdefault(key, {})[self] = None
        return b""

    def subscribe(self, *channels: bytes) -> bytes:
        answers = []
        for channel in channels:
            self.channels[channel] = None
            self.store.subscribers.setdefault(channel, {})[self] = None
            answers.append(array([bulk(b"subscribe"), bulk(channel), integer(len(self.channels))]))
        return b"".join(answers)

    def unsubscribe(self, *channels: bytes) -> bytes:
        answers = []
        for channel in channels or tuple(self.channels):
            self.channels.pop(channel, None)
            remove(self.store.subscribers, channel, self)
            answers.append(array([bulk(b"unsubscribe"), bulk(channel), integer(len(self.channels))]))
        return b"".join(answers) or array([bulk(b"unsubscribe"), NIL, integer(0)])

    def publish(self, channel: bytes, message: bytes) -> bytes:
        """Send a message to all subscribers. A subscriber that does not read fast enough is disconnected."""
        data = array([bulk(b"message"), bulk(channel), bulk(message)])
        count = 0
        for client in self.store.subscribers.get(channel, {}):
            if client.tell((data, False)):
                count += 1
            else:
                self.server.table.cancel(client.entry.id)
        return integer(count)

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
ONLY = "only (P|S)SUBSCRIBE / (P|S)UNSUBSCRIBE / PING / QUIT / RESET are allowed in this context"

WHILE_SUBSCRIBED = (b"SUBSCRIBE", b"UNSUBSCRIBE", b"PING", b"QUIT")

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
    b"RPUSH": (2, MANY, MiniRedis.rpush),
    b"LPOP": (1, 1, MiniRedis.lpop),
    b"BLPOP": (2, MANY, MiniRedis.blpop),
    b"LRANGE": (3, 3, MiniRedis.lrange),
    b"SUBSCRIBE": (1, MANY, MiniRedis.subscribe),
    b"UNSUBSCRIBE": (0, MANY, MiniRedis.unsubscribe),
    b"PUBLISH": (2, 2, MiniRedis.publish),
    b"CONFIG": (2, MANY, MiniRedis.config),
    b"COMMAND": (0, MANY, MiniRedis.command_table),
    b"CLIENT": (1, MANY, MiniRedis.client),
    b"INFO": (0, MANY, MiniRedis.info),
    b"QUIT": (0, 0, MiniRedis.quit),
}
