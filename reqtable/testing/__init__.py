"""Tools for testing handlers and whole servers without sockets, threads or waiting.

See `docs/how-to/test-a-handler.md`.

    from reqtable.testing import Client, exercise, simulate

    exercise(Notes).send(b"put 5\\n").send(b"a b c").send(b"count\\n").expect(b"3\\n")

    one = Client().send(b"put 5\\n").pause(3).send(b"a b c").send(b"count\\n").expect(b"3\\n")
    simulate(lambda: reqtable.TCPServer(("127.0.0.1", 0), Notes), [one] * 10, seed=7)

`exercise` tests one handler. `simulate` tests a server with many clients on a simulated network, where faults happen as
a seed decides.
"""

from reqtable.testing.client import Client, Peer, Unmet
from reqtable.testing.clock import FakeClock
from reqtable.testing.exercise import Exercise, exercise
from reqtable.testing.faults import Faults, shrink
from reqtable.testing.network import SimNetwork
from reqtable.testing.selector import SimSelector
from reqtable.testing.sides import Other
from reqtable.testing.simulation import Report, SimulationFailed, simulate
from reqtable.testing.sockets import SimSocket
from reqtable.testing.upstream import Upstream, UpstreamPeer

__all__ = [
    "Client",
    "Exercise",
    "FakeClock",
    "Faults",
    "Other",
    "Peer",
    "Report",
    "SimNetwork",
    "SimSelector",
    "SimSocket",
    "SimulationFailed",
    "Unmet",
    "Upstream",
    "UpstreamPeer",
    "exercise",
    "shrink",
    "simulate",
]
