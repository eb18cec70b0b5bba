"""Nothing here knows of reqtable: the programs of this folder are run by test_compat.py as anyone's would be."""

from xmlrpc.server import SimpleXMLRPCServer

server = SimpleXMLRPCServer(("127.0.0.1", 0), logRequests=False)
server.register_function(pow)
server.register_introspection_functions()
print(f"port {server.server_address[1]}", flush=True)
server.serve_forever()
