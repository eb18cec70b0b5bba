from werkzeug.serving import run_simple
from werkzeug.wrappers import Request, Response


@Request.application
def words(request: Request) -> Response:
    return Response(f"{len(request.get_data().split())} words")


run_simple("127.0.0.1", 0, words, threaded=True)
