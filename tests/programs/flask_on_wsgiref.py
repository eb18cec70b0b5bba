from wsgiref.simple_server import make_server

from flask import Flask, request

app = Flask(__name__)


@app.post("/words")
def words() -> dict[str, int]:
    return {"words": len(request.get_data().split())}


with make_server("127.0.0.1", 0, app) as server:
    print(f"port {server.server_port}", flush=True)
    server.serve_forever()
