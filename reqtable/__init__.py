"""reqtable: network servers whose requests are rows of an explicit table, worked on by one loop.

The server and handler classes of `socketserver`, and handlers written as state machines or coroutines. See
`docs/design.md` for how it is built.
"""

from reqtable.config import (
    Certificate,
    Config,
    ExecutorOptions,
    ForkOptions,
    PoolOptions,
    ProxyOptions,
    ThreadOptions,
    TLSOptions,
)
from reqtable.core.errors import (
    ConfigurationError,
    HandlerError,
    IncompleteRead,
    InvalidTransition,
    LimitExceeded,
    PeerError,
    ReqtableError,
    SendFileError,
    TimedOut,
)
from reqtable.core.limits import Limits
from reqtable.core.listing import format_rows
from reqtable.core.states import INTEREST, TRANSITIONS, Event, State
from reqtable.core.table import Entry, RequestTable
from reqtable.core.wants import (
    Want,
    call,
    chunk,
    datagram,
    exactly,
    flushed,
    hand_off,
    line,
    nothing,
    rest,
    skip_line,
    sleep,
    until,
)
from reqtable.engine.engine import Engine
from reqtable.engine.system import System
from reqtable.handlers.blocking import BaseRequestHandler, DatagramRequestHandler, StreamRequestHandler
from reqtable.handlers.coroutine import AsyncRequestHandler
from reqtable.handlers.state import StateInfo, StateRequestHandler, Transition, state
from reqtable.mixins import (
    ForkingMixIn,
    ForkingTCPServer,
    ForkingUDPServer,
    ForkingUnixDatagramServer,
    ForkingUnixStreamServer,
    TableMixIn,
    TableTCPServer,
    TableUDPServer,
    TableUnixDatagramServer,
    TableUnixStreamServer,
    ThreadingMixIn,
    ThreadingTCPServer,
    ThreadingUDPServer,
    ThreadingUnixDatagramServer,
    ThreadingUnixStreamServer,
)
from reqtable.servers import BaseServer, TCPServer, UDPServer, UnixDatagramServer, UnixStreamServer
from reqtable.serving import serve

__version__ = "0.1.0"

__all__ = [
    "INTEREST",
    "TRANSITIONS",
    "AsyncRequestHandler",
    "BaseRequestHandler",
    "BaseServer",
    "Certificate",
    "Config",
    "ConfigurationError",
    "DatagramRequestHandler",
    "Engine",
    "Entry",
    "Event",
    "ExecutorOptions",
    "ForkOptions",
    "ForkingMixIn",
    "ForkingTCPServer",
    "ForkingUDPServer",
    "ForkingUnixDatagramServer",
    "ForkingUnixStreamServer",
    "HandlerError",
    "IncompleteRead",
    "InvalidTransition",
    "LimitExceeded",
    "Limits",
    "PeerError",
    "PoolOptions",
    "ProxyOptions",
    "ReqtableError",
    "RequestTable",
    "SendFileError",
    "State",
    "StateInfo",
    "StateRequestHandler",
    "StreamRequestHandler",
    "System",
    "TCPServer",
    "TLSOptions",
    "TableMixIn",
    "TableTCPServer",
    "TableUDPServer",
    "TableUnixDatagramServer",
    "TableUnixStreamServer",
    "ThreadOptions",
    "ThreadingMixIn",
    "ThreadingTCPServer",
    "ThreadingUDPServer",
    "ThreadingUnixDatagramServer",
    "ThreadingUnixStreamServer",
    "TimedOut",
    "Transition",
    "UDPServer",
    "UnixDatagramServer",
    "UnixStreamServer",
    "Want",
    "call",
    "chunk",
    "datagram",
    "exactly",
    "flushed",
    "format_rows",
    "hand_off",
    "line",
    "nothing",
    "rest",
    "serve",
    "skip_line",
    "sleep",
    "state",
    "until",
]
