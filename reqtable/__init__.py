"""reqtable: network servers whose requests are rows of an explicit table, served by one loop.

The package has the server and handler classes of `socketserver`, and handlers written as state machines or coroutines.
`docs/explanation/design.md` says how it is built.
"""

from reqtable.config import (
    Certificate,
    Config,
    ControlOptions,
    ExecutorOptions,
    ForkOptions,
    GreenletOptions,
    PoolOptions,
    ProxyOptions,
    RestartOptions,
    ThreadOptions,
    TLSOptions,
)
from reqtable.handlers import lean as _lean_path
from reqtable.handlers.blocking import BaseRequestHandler, DatagramRequestHandler, StreamRequestHandler
from reqtable.handlers.coroutine import AsyncRequestHandler
from reqtable.handlers.declaration import StateInfo, state
from reqtable.handlers.state import StateRequestHandler
from reqtable.handlers.transition import Transition
from reqtable.loop.mailbox import Timer
from reqtable.loop.platform import System
from reqtable.net.connection import Connection, connect
from reqtable.run.serve import serve
from reqtable.server.classes import BaseServer, TCPServer, UDPServer, UnixDatagramServer, UnixStreamServer
from reqtable.server.engine import Engine
from reqtable.server.mixins import (
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
from reqtable.table.connecting import start_tls
from reqtable.table.errors import (
    ConfigurationError,
    ConnectFailed,
    HandlerError,
    IncompleteRead,
    InvalidTransition,
    LimitExceeded,
    NotMovable,
    PeerError,
    ReqtableError,
    SendFileError,
    TimedOut,
)
from reqtable.table.limits import Limits
from reqtable.table.reaching import Arrived, disconnected, either, end_output, told
from reqtable.table.snapshot import format_rows
from reqtable.table.states import INTEREST, TRANSITIONS, Event, State
from reqtable.table.table import Entry, RequestTable
from reqtable.table.want import Want
from reqtable.table.wants import (
    call,
    chunk,
    datagram,
    exactly,
    flushed,
    hand_off,
    line,
    nothing,
    parsed,
    rest,
    skip_line,
    sleep,
    until,
)

_lean_path.install()

__version__ = "0.1.0"

__all__ = [
    "INTEREST",
    "TRANSITIONS",
    "Arrived",
    "AsyncRequestHandler",
    "BaseRequestHandler",
    "BaseServer",
    "Certificate",
    "Config",
    "ConfigurationError",
    "ConnectFailed",
    "Connection",
    "ControlOptions",
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
    "GreenletOptions",
    "HandlerError",
    "IncompleteRead",
    "InvalidTransition",
    "LimitExceeded",
    "Limits",
    "NotMovable",
    "PeerError",
    "PoolOptions",
    "ProxyOptions",
    "ReqtableError",
    "RequestTable",
    "RestartOptions",
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
    "Timer",
    "Transition",
    "UDPServer",
    "UnixDatagramServer",
    "UnixStreamServer",
    "Want",
    "call",
    "chunk",
    "connect",
    "datagram",
    "disconnected",
    "either",
    "end_output",
    "exactly",
    "flushed",
    "format_rows",
    "hand_off",
    "line",
    "nothing",
    "parsed",
    "rest",
    "serve",
    "skip_line",
    "sleep",
    "start_tls",
    "state",
    "told",
    "until",
]
