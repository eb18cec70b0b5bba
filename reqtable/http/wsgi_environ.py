"""The `environ` of a WSGI application (PEP 3333): what it is told of a request, and which proxies are believed."""

from __future__ import annotations

import ipaddress
import re
import socket
import sys
from functools import lru_cache
from typing import Any
from urllib.parse import unquote_to_bytes

from reqtable.http.head import Fields, Head
from reqtable.http.known import Known
from reqtable.http.wsgi_call import FileWrapper

Networks = tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]

PROXY_HEADERS = ("x-forwarded", "forwarded")
_WILDCARDS = {"0.0.0.0", "::", ""}
_NONE = "-"
# A copy of a dict that has the keys already need not grow for them.
_OF_EACH_REQUEST = (
    "REQUEST_METHOD",
    "PATH_INFO",
    "QUERY_STRING",
    "REQUEST_URI",
    "RAW_URI",
    "REMOTE_ADDR",
    "wsgi.errors",
    "wsgi.input",
    "reqtable.request_id",
    "reqtable.disconnected",
)
_HOST = re.compile(r"[0-9A-Za-z._~-]+(?::[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](?::[0-9]{1,5})?")
# A pair of Forwarded (RFC 7239, 4)
_PAIR = re.compile(r'\s*([!#$%&\'*+\-.^_`|~0-9A-Za-z]+)=(?:"((?:[^"\\]|\\.)*)"|([^\s;,"]*))\s*')


def base_environ(local: Any, is_tls: bool, multithread: bool, multiprocess: bool) -> dict[str, Any]:
    """Return what is the same for all requests of a server."""
    host, port = ("localhost", "80")
    if isinstance(local, tuple):
        host, port = str(local[0]), str(local[1])
    if host in _WILDCARDS:
        host = socket.gethostname()
    environ: dict[str, Any] = {
        "SERVER_NAME": host,
        "SERVER_PORT": port,
        "SERVER_SOFTWARE": "reqtable",
        "SERVER_PROTOCOL": "HTTP/1.1",  # nearly always
        "GATEWAY_INTERFACE": "CGI/1.1",
        "SCRIPT_NAME": "",
        "wsgi.version": (1, 0),
        "wsgi.multithread": multithread,
        "wsgi.multiprocess": multiprocess,
        "wsgi.run_once": False,
        "wsgi.file_wrapper": FileWrapper,
        "wsgi.input_terminated": True,
        "wsgi.url_scheme": "https" if is_tls else "http",
    }
    if is_tls:
        environ["HTTPS"] = "on"
    return environ | dict.fromkeys(_OF_EACH_REQUEST, "")


def fill(environ: dict[str, Any], head: Head, path: str, query: str, peer: Any) -> None:
    """Add what is of one request. `path` is decoded, as bytes in latin-1."""
    environ["REQUEST_METHOD"] = head.method
    environ["PATH_INFO"] = path
    environ["QUERY_STRING"] = query
    if head.version != (1, 1):
        environ["SERVER_PROTOCOL"] = "HTTP/1.0"
    environ["REQUEST_URI"] = environ["RAW_URI"] = head.target
    environ["wsgi.errors"] = sys.stderr
    if type(peer) is tuple:
        environ["REMOTE_ADDR"] = peer[0]
        environ["REMOTE_PORT"] = str(peer[1])
    size = len(environ)
    for name, value in head.fields:
        environ[_KEYS[name]] = value
    if len(environ) < size + len(head.fields):
        _join(environ, head.fields)
    environ.pop(_NONE, None)


def _join(environ: dict[str, Any], fields: Fields) -> None:
    """Join the values of the fields that have come more than once."""
    values: dict[str, list[str]] = {}
    for name, value in fields:
        values.setdefault(_KEYS[name], []).append(value)
    for key, found in values.items():
        environ[key] = ("; " if key == "HTTP_COOKIE" else ",").join(found)


def path_and_query(head: Head) -> tuple[str, str]:
    """Return the path of a request, without escapes, and the query.

    The path is bytes, as text in latin-1 (PEP 3333, "Unicode Issues").
    """
    target = head.target
    if target[0] != "/":
        target = head.origin_form
    path, _, query = target.partition("?")
    return (unquote_to_bytes(path).decode("latin-1") if "%" in path else path), query


def _key(name: str) -> str:
    """Return the variable of a field; _NONE if there is none.

    A name with an underscore would have the variable of the name with a hyphen, so a client could pass for a proxy.
    `Proxy` would be the variable HTTP_PROXY, which programs take for a setting.
    """
    key = "HTTP_" + name.upper().replace("-", "_")
    if "_" in name or name in ("proxy", "transfer-encoding"):
        key = _NONE
    elif name in ("content-type", "content-length"):
        key = key.removeprefix("HTTP_")
    return key


_KEYS: Known[str, str] = Known(_key, 1024)


# -- proxies ----------------------------------------------------------------------------------------------------------


def is_trusted(peer: Any, networks: Networks, trusts_unix: bool) -> bool:
    """Return whether a peer is one of the proxies."""
    if type(peer) is not tuple:
        return trusts_unix
    address = _address(peer[0])
    return address is not None and any(address in each for each in networks)


def believe(environ: dict[str, Any], family: str, networks: Networks) -> None:
    """Take the client, the scheme and the host from what a trusted proxy says by one family of fields.

    The fields of the other family are removed: the proxy passes on what the client has sent of them.
    """
    if family == "forwarded":
        _remove(environ, "HTTP_X_FORWARDED_")
        steps = _forwarded(environ.get("HTTP_FORWARDED", ""))
        clients = [each.get("for", "") for each in steps]
        last = steps[-1] if steps else {}
        scheme, host = last.get("proto", ""), last.get("host", "")
    else:
        _remove(environ, "HTTP_FORWARDED")
        clients = environ.get("HTTP_X_FORWARDED_FOR", "").split(",")
        scheme = environ.get("HTTP_X_FORWARDED_PROTO", "").rpartition(",")[2]
        host = environ.get("HTTP_X_FORWARDED_HOST", "").rpartition(",")[2]
    _take_client(environ, clients, networks)
    scheme, host = scheme.strip().lower(), host.strip()
    if scheme in ("http", "https"):
        environ["wsgi.url_scheme"] = scheme
        environ.pop("HTTPS", None)
        if scheme == "https":
            environ["HTTPS"] = "on"
    if _HOST.fullmatch(host):
        environ["HTTP_HOST"] = host


def forget(environ: dict[str, Any]) -> None:
    """Remove what only a trusted proxy may say: also fields that are not used here, such as X-Forwarded-Port."""
    _remove(environ, "HTTP_X_FORWARDED_", "HTTP_FORWARDED")


def _remove(environ: dict[str, Any], *beginnings: str) -> None:
    """Remove the variables whose names begin so."""
    for name in [each for each in environ if each.startswith(beginnings)]:
        del environ[name]


def _take_client(environ: dict[str, Any], clients: list[str], networks: Networks) -> None:
    """Take the nearest client that is no trusted proxy: what it says of those before it may be a lie."""
    for each in reversed(clients):
        host, port = _host_and_port(each.strip())
        address = _address(host)
        if address is None:
            return
        environ["REMOTE_ADDR"] = str(address)
        environ["REMOTE_PORT"] = port
        if not any(address in network for network in networks):
            return


def _host_and_port(text: str) -> tuple[str, str]:
    if text[:1] == "[":
        host, _, rest = text[1:].partition("]")
        port = rest.removeprefix(":")
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    else:
        host, port = text, ""
    return host, port if port.isascii() and port.isdigit() else "0"


def _forwarded(text: str) -> list[dict[str, str]]:
    """Parse a Forwarded field: the pairs of each step. Returns [] if it is not well-formed."""
    steps: list[dict[str, str]] = [{}]
    at = 0
    while at < len(text):
        found = _PAIR.match(text, at)
        if found is None:
            return []
        value = found[3] if found[2] is None else re.sub(r"\\(.)", r"\1", found[2])
        steps[-1][found[1].lower()] = value
        at = found.end()
        if at < len(text):
            if text[at] not in ";,":
                return []
            if text[at] == ",":
                steps.append({})
            at += 1
    return [each for each in steps if each]


@lru_cache(maxsize=1024)
def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        found = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found
