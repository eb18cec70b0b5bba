"""An API for notes, as JSON: routes, a body that must be JSON, forms with files, and an answer in pieces.

    reqtable serve examples/http_api.py:Notes --bind tcp://127.0.0.1:8000

    curl -d '{"text": "milk"}' -H 'Content-Type: application/json' http://127.0.0.1:8000/notes
    curl http://127.0.0.1:8000/notes/1
    curl -F file=@README.md http://127.0.0.1:8000/files
    curl http://127.0.0.1:8000/numbers/1000000 | tail -c 100

All requests share the notes, so don't use `--dispatch fork`: each child would have its own copy. `save_state` and
`restore_state` keep the notes over a restart (`reqtable restart`).
"""

import json
from typing import Any, ClassVar

from reqtable import Transition, flushed, state
from reqtable.http import BadRequest, HTTPRequestHandler, route

NOTES_MAX = 10_000


class Notes(HTTPRequestHandler):
    """Keeps notes in memory."""

    notes: ClassVar[dict[str, str]] = {}
    last: ClassVar[list[int]] = [0]

    number: int = 0  # the next that `numbers` sends
    end: int = 0

    @classmethod
    def save_state(cls, server: Any) -> dict[str, Any]:  # noqa: ARG003
        return {"notes": cls.notes, "last": cls.last}

    @classmethod
    def restore_state(cls, server: Any, data: dict[str, Any]) -> None:  # noqa: ARG003
        """Add the notes: with workers, several old ones may give theirs to one new worker."""
        cls.last[0] = max(cls.last[0], data["last"][0])
        for number, text in data["notes"].items():
            if number in cls.notes:  # another old worker has given a note the same number
                cls.last[0] += 1
                number = str(cls.last[0])
            cls.notes[number] = text

    @route("GET", "/notes")
    def all_notes(self) -> Transition:
        return self.answer_json(200, self.notes)

    @route("POST", "/notes")
    def add(self) -> Transition:
        if len(self.notes) >= NOTES_MAX:
            raise BadRequest(507, f"there are {NOTES_MAX} notes already")
        text = self.text_sent()
        self.last[0] += 1
        self.notes[str(self.last[0])] = text
        return self.answer_json(201, {"id": self.last[0]}, {"Location": f"/notes/{self.last[0]}"})

    @route("GET", "/notes/{id}")
    def show(self, id: str) -> Transition:
        return self.answer_json(200, {"text": self.notes[self.key(id)], "id": int(id)})

    @route("DELETE", "/notes/{id}")
    def delete(self, id: str) -> Transition:
        del self.notes[self.key(id)]
        return self.answer(204)

    @route("POST", "/files")
    def take_files(self) -> Transition:
        files = [part for part in self.request.form() if part.filename is not None]
        return self.answer_json(200, {part.filename: len(part.data) for part in files})

    @route("GET", "/numbers/{count}")
    def numbers(self, count: str) -> Transition:
        """Send many lines, as fast as the client reads them: no more than a piece is in memory."""
        if not count.isdecimal() or len(count) > 9:
            raise BadRequest(400, "the count is not a number of at most nine digits")
        self.number, self.end = 0, int(count)
        self.begin_answer(200, {"Content-Type": "text/plain"})
        return self.more

    @state(flushed())
    def more(self, _: None) -> Transition:
        upto = min(self.number + 1000, self.end)
        self.write("".join([f"{number}\n" for number in range(self.number, upto)]).encode())
        self.number = upto
        return self.more if upto < self.end else self.end_answer()

    def answer_json(self, status: int, value: Any, fields: dict[str, str] | None = None) -> Transition:
        return self.answer(status, json.dumps(value) + "\n", fields or {}, content_type="application/json")

    def text_sent(self) -> str:
        try:
            return str(json.loads(self.request.body)["text"])
        except (ValueError, LookupError, TypeError):
            raise BadRequest(400, 'the body must be JSON, such as {"text": "milk"}') from None

    def key(self, id: str) -> str:
        if id not in self.notes:
            raise BadRequest(404, f"there is no note {id}")
        return id
