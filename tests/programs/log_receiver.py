import logging
import pickle
import struct
import sys
from socketserver import StreamRequestHandler, ThreadingTCPServer


class Receiver(StreamRequestHandler):
    """Takes the records of `logging.handlers.SocketHandler`: four bytes of length, then a pickled dict."""

    def handle(self) -> None:
        while len(header := self.rfile.read(4)) == 4:
            (size,) = struct.unpack(">L", header)
            record = logging.makeLogRecord(pickle.loads(self.rfile.read(size)))
            logging.getLogger(record.name).handle(record)


logging.basicConfig(stream=sys.stdout, format="%(name)s says %(message)s")
with ThreadingTCPServer(("127.0.0.1", 0), Receiver) as server:
    print(f"port {server.server_address[1]}", flush=True)
    server.serve_forever()
