"""The live page: one file of HTML on a TCP port, and the part of the control API that the page needs.

A browser brings its own dangers: pages of other sites can send requests to this port, too. So the server looks at three
things before anything is done:

* `Host` names this server. A site that binds its own name to this machine (DNS rebinding) is refused.
* `Origin` and `Sec-Fetch-Site`, which a browser sends and a page can't forge, are this page's own.
* An action needs the token of the configuration. Without a token there, nothing can be done from this port.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import re
from functools import cache
from importlib import resources
from typing import Any

from reqtable.control.api import ControlHandler
from reqtable.control.port import PortServer
from reqtable.control.source import Source
from reqtable.handlers.transition import Transition
from reqtable.http import route
from reqtable.http.answer import FieldsLike, pairs_of
from reqtable.server.engine import Engine
from reqtable.table.addresses import address_text, host_text

log = logging.getLogger("reqtable.control")

HIDDEN = "(hidden)"  # what the page gets instead of a value that may be secret

# The methods that answer on this port; the control API may have others.
_SHOWN = {"page", "requests", "one_request", "stats", "workers", "machine", "config", "events"}
_ACTIONS = {"cancel_one", "cancel_many", "drain", "set_config"}
_OWN_NAMES = ("localhost", "127.0.0.1", "::1")  # always this machine, also at the near end of a tunnel
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]]+))(?::\d+)?")


@cache
def page_file() -> tuple[bytes, str]:
    """Return the page, and the policy that lets it run its own script and style, and nothing else."""
    text = resources.files("reqtable.control").joinpath("page.html").read_text("utf-8")
    policy = (
        f"default-src 'none'; script-src {_hash_of('script', text)}; style-src {_hash_of('style', text)}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    return text.encode(), policy


def _hash_of(element: str, text: str) -> str:
    [content] = re.findall(f"<{element}>(.*?)</{element}>", text, flags=re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


class PageHandler(ControlHandler):
    """Answers a browser: the page, what can be looked at, and the actions if the browser has the token."""

    @route("GET", "/")
    def page(self) -> Transition:
        return self.answer(200, page_file()[0], content_type="text/html; charset=utf-8")

    def on_head(self) -> Transition:
        """Refuse what may not be done, before the body is read."""
        refusal = self._refusal()
        if refusal is None:
            return None
        status, text = refusal
        log.warning("control: the page refused %s: %s", address_text(self.client_address), text)
        fields = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
        return self.answer(status, f"{text}\n", fields)

    def _begin(self, status: int, fields: FieldsLike, length: int | None, reason: str | None = None) -> bytes:
        """Begin each answer with fields that tell a browser to be careful with it."""
        own = {
            "Cache-Control": "no-store",
            "Content-Security-Policy": page_file()[1],
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
        }
        others = [each for each in pairs_of(fields) if each[0] not in own]
        return super()._begin(status, [*own.items(), *others], length, reason)

    def _refusal(self) -> tuple[int, str] | None:
        """Return the status and the reason if this request is refused."""
        host, origin = self.request.get("host") or "", self.request.get("origin")
        if not self._is_own(host):
            return 403, f"this server is not {host!r}: use the address of [control] page, or localhost"
        if origin is not None and origin != f"http://{host}":
            return 403, f"a page of {origin!r} may not use this server"
        if self.request.path != "/" and self.request.get("sec-fetch-site") in ("cross-site", "same-site"):
            return 403, "a page of another site may not use this server"
        methods, _ = self._routes.find(self.request.path)
        method = self.request.method
        name = methods.get("GET" if method == "HEAD" else method)
        if methods and _SHOWN.isdisjoint(methods.values()) and _ACTIONS.isdisjoint(methods.values()):
            return 404, "there is no such resource on this port"
        if name not in _ACTIONS:
            return None
        if not self.server.token:
            return 403, "this port is read-only: an action needs [control] token in the configuration"
        if origin is None:
            return 403, "an action needs the field Origin: programs use the control socket"
        kind, _, given = (self.request.get("authorization") or "").partition(" ")
        is_right = hmac.compare_digest(given.strip().encode("latin-1"), self.server.token.encode())
        return None if kind.lower() == "bearer" and is_right else (401, "the token is wrong")

    def _is_own(self, host: str) -> bool:
        """Return whether the field Host names this server."""
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        own = self.entry.transport.request.getsockname()
        name = (found[1] or found[2]).lower()
        return name in (*_OWN_NAMES, self.server.host, host_text(own))

    def _answer_config(self, batch: Any) -> Transition:
        return super()._answer_config([{**each, "value": _shown(each["key"], each["value"])} for each in batch])

    def _user(self) -> str:
        return f"the page, used from {address_text(self.client_address)},"


def _shown(key: str, value: Any) -> Any:
    """Return a value of the configuration without what may be secret: the token, and what executors are given."""
    return HIDDEN if value and key.rpartition(".")[2] in ("token", "arguments") else value


class PageServer(PortServer):
    """Serves the page at `place`. An empty token, or none, allows no action."""

    def __init__(self, place: str, engine: Engine, source: Source, token: str | None) -> None:
        self.token = token
        super().__init__(place, PageHandler, engine, source)
