"""A program that makes its first server, and serves its first request, while `socket.socket` is patched.

Run by test_servers.py in a process of its own: `first_use.py POLICY HANDLER [CERTIFICATE AUTHORITY]`. Prints which of
the modules that are imported meanwhile hold on to the patch, and which classes are built on the patch.
"""

import socket
import sys
import threading

import reqtable
from reqtable.config import TLSOptions


class Patch(socket.socket):
    """Stands in for `socket.socket` for a while."""


class Blocking(reqtable.StreamRequestHandler):
    def handle(self):
        self.wfile.write(self.rfile.readline().upper())


class State(reqtable.StateRequestHandler):
    @reqtable.state(reqtable.line())
    def only(self, text):
        self.send(text.upper())
        return None


def main(policy, handler, certificate=None, authority=None):
    before = set(sys.modules)
    own = socket.socket
    options = TLSOptions(cert=certificate) if certificate else TLSOptions()
    socket.socket = Patch
    try:
        server = reqtable.TCPServer(
            ("127.0.0.1", 0), globals()[handler], dispatch=policy, config=reqtable.Config(tls=options)
        )
        with server:
            loop = threading.Thread(target=server.serve_forever)
            loop.start()
            answer = ask(own, server.server_address, authority)
            server.shutdown()
            loop.join()
    finally:
        socket.socket = own
    assert answer == b"HELLO\n", answer
    imported = [
        module for name, module in sys.modules.items() if name not in before and module is not sys.modules["__main__"]
    ]
    print(sorted(module.__name__ for module in imported if Patch in vars(module).values()))
    print(Patch.__subclasses__())


def ask(plain, address, authority):
    client = plain()
    client.settimeout(20)
    client.connect(address)
    if authority:
        import ssl

        client = ssl.create_default_context(cafile=authority).wrap_socket(client, server_hostname="127.0.0.1")
    with client:
        client.sendall(b"hello\n")
        return client.recv(100)


if __name__ == "__main__":
    main(*sys.argv[1:])
