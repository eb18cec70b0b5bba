"""The control API: HTTP/1.1 with JSON, on a Unix socket. `docs/reference/control-api.md` describes its resources."""

from __future__ import annotations

import reprlib
from dataclasses import replace
from typing import Any

import msgspec

from reqtable.control.jobs import END
from reqtable.control.query import Query, QueryError, whole_number
from reqtable.control.request import JSON
from reqtable.control.scrape import ScrapeHandler
from reqtable.handlers.declaration import state
from reqtable.handlers.transition import Transition
from reqtable.http import route
from reqtable.http.messages import Request
from reqtable.table.addresses import printable
from reqtable.table.wants import flushed

CANCEL_MAX = 1000  # how many requests one bulk cancel may end, unless it says `max`

_SHORT = reprlib.Repr()  # of a value in a message
_ID_DIGITS = 17  # ids are below 2**53
_NDJSON = "application/x-ndjson"
_OCTETS = "application/octet-stream"


class ControlHandler(ScrapeHandler):
    """Answers an operator. The source of its server does the work."""

    _separator: bytes = b""
    _is_ndjson = False

    # -- the resources ------------------------------------------------------------------------------------------------

    @route("GET", "/v1/requests")
    def requests(self) -> Transition:
        """Answer with the rows that a query asks for, or with groups of them if it has `by`."""
        asked = self._query()
        self._is_ndjson = _wants_ndjson(self.request, asked)
        if "by" in asked:
            return self._ask("groups", asked, self._answer_batch)
        Query.of(asked)
        return self._ask("requests", asked, self._begin_rows)

    @route("GET", "/v1/requests/{id}")
    def one_request(self, id: str) -> Transition:
        return self._ask("request", {"id": _id(id)}, self._answer_found)

    @route("GET", "/v1/requests/{id}/record")
    def one_record(self, id: str) -> Transition:
        return self._ask("record", {"id": _id(id)}, self._answer_found)

    @route("POST", "/v1/requests/{id}/cancel")
    def cancel_one(self, id: str) -> Transition:
        return self._cancel([_id(id)])

    @route("POST", "/v1/requests/cancel")
    def cancel_many(self) -> Transition:
        """Cancel the requests with the `ids` of the body, or those that match its filters."""
        body = self._body()
        if "ids" in body:
            return self._cancel(_ids(body["ids"]))
        is_dry, most = body.pop("dry_run", False), whole_number("max", body.pop("max", CANCEL_MAX))
        if not isinstance(is_dry, bool):
            raise QueryError(f"dry_run={is_dry!r}: give true or false")
        query = Query.of(body)
        if (query.sort, query.limit, query.also) != (None, None, None):
            raise QueryError("a cancel has no sort, limit or also: all requests that match are ended, at most max")
        if query == Query():
            raise QueryError("name the ids, or a filter such as older: everything would be cancelled")
        query = replace(query, limit=most + 1)
        rows: list[Any] = []

        def gather(batch: Any) -> Transition:
            if batch is not END:
                rows.extend(batch)
                return self._pull(gather)
            if len(rows) > most:
                return self._answer(409, {"error": f"more than {most} requests match: say max={len(rows)} or more"})
            if is_dry:
                return self._answer(200, {"would_cancel": [row["id"] for row in rows], "rows": rows})
            return self._cancel([row["id"] for row in rows])

        return self._ask("requests", query.plain(), gather)

    @route("GET", "/v1/stats")
    def stats(self) -> Transition:
        return self._ask("stats", {}, self._answer_batch)

    @route("GET", "/v1/workers")
    def workers(self) -> Transition:
        return self._ask("workers", {}, self._answer_batch)

    @route("GET", "/v1/machine")
    def machine(self) -> Transition:
        return self._ask("machine", {}, self._answer_batch)

    @route("GET", "/v1/events")
    def events(self) -> Transition:
        """Send what happens to requests, as server-sent events, until the client leaves."""
        kinds = self._query().get("kinds")
        self.begin_events()
        return self._ask("events", {"kinds": kinds.split(",") if kinds else None}, self._send_events)

    @route("GET", "/v1/stacks")
    def stacks(self) -> Transition:
        return self._ask("stacks", {}, self._answer_batch)

    @route("GET", "/v1/config")
    def config(self) -> Transition:
        return self._ask("config", {}, self._answer_config)

    @route("PATCH", "/v1/config")
    def set_config(self) -> Transition:
        changes = self._body()
        shown = ", ".join(f"{printable(key)} = {_SHORT.repr(value)}" for key, value in changes.items())
        return self._act("config", {"changes": changes}, self._answer_config, "sets %s", shown)

    @route("POST", "/v1/reload")
    def reload(self) -> Transition:
        return self._act("reload", {}, self._answer_batch, "asks for a reload")

    @route("POST", "/v1/drain")
    def drain(self) -> Transition:
        body = self._body("stay", "worker")
        how = " without an end" if body.get("stay") else ""
        return self._act("drain", body, self._answer_batch, "asks for a drain%s", how)

    @route("POST", "/v1/restart")
    def restart(self) -> Transition:
        """Restart the program, and answer how that went; as NDJSON, also how it goes."""
        body = self._body("check")
        how = ": a check" if body.get("check") else ""
        self._is_ndjson = _wants_ndjson(self.request, self._query())
        then = self._begin_rows if self._is_ndjson else self._answer_last
        return self._act("restart", body, then, "asks for a restart%s", how)

    @route("PUT", "/v1/log-level")
    def set_log_level(self) -> Transition:
        body = self._body()
        return self._act("log_level", body, self._answer_batch, "sets the log level: %s", _SHORT.repr(body))

    @route("GET", "/v1/log-level")
    def log_level(self) -> Transition:
        return self._ask("log_level", self._query(), self._answer_batch)

    # -- answers ------------------------------------------------------------------------------------------------------

    def _answer_config(self, batch: Any) -> Transition:
        return self._answer(200, batch)

    def _answer_found(self, batch: Any) -> Transition:
        if isinstance(batch, bytes):
            return self.answer(200, batch, content_type=_OCTETS)
        return self._answer(404, {"error": "there is no such request"}) if batch is None else self._answer(200, batch)

    def _begin_rows(self, batch: Any) -> Transition:
        self.begin_answer(200, {"Content-Type": _NDJSON if self._is_ndjson else JSON, "Cache-Control": "no-store"})
        self._separator = b"" if self._is_ndjson else b"["
        return self._send_rows(batch)

    def _send_rows(self, batch: Any) -> Transition:
        """Send a batch of rows. Go on when the operator has taken it."""
        if batch is END:
            self.write(b"" if self._is_ndjson else self._separator.replace(b",\n", b"") + b"]\n")
            return self.end_answer()
        lines = [msgspec.json.encode(row) for row in batch]
        if self._is_ndjson:
            self.write(b"\n".join(lines) + b"\n")
        else:
            self.write(self._separator + b",\n".join(lines))
            self._separator = b",\n"
        return self.sent

    @state(flushed())
    def sent(self, _: None) -> Transition:
        """The operator has taken the rows."""
        return self._pull(self._send_rows)

    def _send_events(self, batch: Any) -> Transition:
        if not batch:
            self.send_event()  # a comment: from here on, nothing is missed
        for event in batch:
            self.send_event(msgspec.json.encode(event).decode(), event=event["event"])
        return self.sent_events

    @state(flushed())
    def sent_events(self, _: None) -> Transition:
        """The operator has taken the events."""
        return self._pull(self._send_events)

    def _cancel(self, ids: list[int]) -> Transition:
        def answer(found: Any) -> Transition:
            cancelled = [each["id"] for each in found]
            known = set(cancelled)
            missing = [each for each in ids if each not in known]
            goes_on = [each["id"] for each in found if each["goes_on"]]
            by_worker = {each["worker"]: each["call_threads"] for each in found if each["call_threads"] is not None}
            threads = {name: sum(each[name] for each in by_worker.values()) for name in ("busy", "most")}
            data = {
                "cancelled": cancelled,
                "missing": missing,
                "goes_on": goes_on,
                "call_threads": threads if by_worker else None,
            }
            return self._answer(200 if cancelled or not ids else 404, data)

        return self._act("cancel", {"ids": ids}, answer, "cancels %s", ", ".join(map(str, ids)) or "nothing")


def _wants_ndjson(request: Request, asked: dict[str, Any]) -> bool:
    """Return whether an answer is to be lines of JSON. Takes the format out of what the query asks for."""
    return asked.pop("format", None) == "ndjson" or _NDJSON in (request.get("accept") or "")


def _id(found: Any) -> int:
    """Return an id that is a number in JSON, or digits. Another number is not rounded: it would end another request."""
    is_text = isinstance(found, str) and found.isascii() and found.isdecimal() and len(found) < _ID_DIGITS
    if is_text or (type(found) is int and 0 <= found < 10**_ID_DIGITS):
        return int(found)
    raise QueryError(f"{_SHORT.repr(found)} is not the id of a request")


def _ids(found: Any) -> list[int]:
    if not isinstance(found, list):
        raise QueryError("ids must be a list of the ids of requests")
    return [_id(each) for each in found]
