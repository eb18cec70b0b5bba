"""Replaces the standard library's `socketserver` if this folder comes first on the import path."""

# Tests of other programs patch these names, too.
import os  # noqa: F401
import selectors  # noqa: F401
import socket  # noqa: F401
import sys  # noqa: F401
import threading  # noqa: F401

from reqtable.handlers.blocking import BaseRequestHandler, DatagramRequestHandler, StreamRequestHandler
from reqtable.server.classes import BaseServer, TCPServer, UDPServer, UnixDatagramServer, UnixStreamServer
from reqtable.server.mixins import (
    ForkingMixIn,
    ForkingTCPServer,
    ForkingUDPServer,
    ForkingUnixDatagramServer,
    ForkingUnixStreamServer,
    ThreadingMixIn,
    ThreadingTCPServer,
    ThreadingUDPServer,
    ThreadingUnixDatagramServer,
    ThreadingUnixStreamServer,
)

__all__ = [
    "BaseRequestHandler",
    "BaseServer",
    "DatagramRequestHandler",
    "ForkingMixIn",
    "ForkingTCPServer",
    "ForkingUDPServer",
    "ForkingUnixDatagramServer",
    "ForkingUnixStreamServer",
    "StreamRequestHandler",
    "TCPServer",
    "ThreadingMixIn",
    "ThreadingTCPServer",
    "ThreadingUDPServer",
    "ThreadingUnixDatagramServer",
    "ThreadingUnixStreamServer",
    "UDPServer",
    "UnixDatagramServer",
    "UnixStreamServer",
]
