"""The resources for a monitoring system: `/metrics`, `/healthz` and `/readyz`."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter
from typing import Any

from reqtable.control.exposition import CONTENT_TYPE, check_client, texts_of
from reqtable.control.jobs import SLICE_S
from reqtable.control.request import ControlRequest
from reqtable.handlers.declaration import state
from reqtable.handlers.transition import Transition
from reqtable.http import BadRequest, route
from reqtable.table.errors import ConfigurationError
from reqtable.table.wants import flushed


class ScrapeHandler(ControlRequest):
    """Answers a monitoring system, which can change nothing."""

    _texts: Iterator[bytes]

    @route("GET", "/metrics")
    def metrics(self) -> Transition:
        try:
            check_client()
        except ConfigurationError as error:
            raise BadRequest(501, str(error)) from None
        return self._ask("metrics", {}, self._begin_metrics)

    @route("GET", "/healthz")
    def healthz(self) -> Transition:
        return self.answer(200, "ok\n")

    @route("GET", "/readyz")
    def readyz(self) -> Transition:
        """Say whether new clients are welcome: not while the server drains, nor while no worker is ready."""
        return self._ask("ready", {}, self._answer_ready)

    def _answer_ready(self, ready: Any) -> Transition:
        return self.answer(200, "ready\n") if any(ready) else self.answer(503, "not ready\n")

    def _begin_metrics(self, found: Any) -> Transition:
        self._texts = texts_of(found["figures"])
        self.begin_answer(200, {"Content-Type": CONTENT_TYPE, "Cache-Control": "no-store"})
        return self._send_metrics()

    def _send_metrics(self) -> Transition:
        """Send the text of some metrics. Go on in another pass, so that the loop is not held up."""
        spent_at = perf_counter() + SLICE_S / 2  # the rest is for what the pass does besides
        for text in self._texts:
            self.write(text)
            if perf_counter() >= spent_at:
                return self.sent_metrics
        return self.end_answer()

    @state(flushed())
    def sent_metrics(self, _: None) -> Transition:
        """The client has taken the text so far."""
        return self._send_metrics()
