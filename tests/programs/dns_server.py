import threading

from dnslib import RR
from dnslib.server import BaseResolver, DNSHandler, DNSLogger, DNSRecord, DNSServer


class Resolver(BaseResolver):
    def resolve(self, request: DNSRecord, handler: DNSHandler) -> DNSRecord:
        reply = request.reply()
        reply.add_answer(*RR.fromZone("name.example. 60 A 192.0.2.7"))
        return reply


quiet = DNSLogger(log="-request,-reply,-truncated,-error")
over_tcp = DNSServer(Resolver(), address="127.0.0.1", port=0, tcp=True, logger=quiet)
over_udp = DNSServer(Resolver(), address="127.0.0.1", port=over_tcp.server.server_address[1], logger=quiet)
threading.Thread(target=over_udp.server.serve_forever, daemon=True).start()
print(f"port {over_tcp.server.server_address[1]}", flush=True)
over_tcp.server.serve_forever()
