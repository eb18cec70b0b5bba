"""What can be configured: `Config`, its defaults, its file, and which of several sources wins.

Strongest first: a state's own `dispatch=`; the constructor's argument; `REQTABLE_DISPATCH` in the environment; the
file; the class attribute `dispatch`, which a mix-in sets; the default. The file is `reqtable.toml`, or the table
`[tool.reqtable]` of `pyproject.toml`:

    dispatch = "pool"
    call_on = "thread"            # where a call() runs that does not say
    workers = 4                   # processes that serve; without it, one, by itself

    [limits]                      # any field of reqtable.Limits
    entries_max = 10_000

    [thread]
    threads_max = 200
    [pool]
    size = 8
    [fork]
    max_children = 40
    [executor]                    # policy "executor"; without it, a pool of processes
    factory = "module:callable"
    arguments = { max_workers = 4 }
    [executors.cluster]           # call(…, on="cluster")
    factory = "module:callable"

    [tls]                         # what tls:// binds serve with; paths of PEM files
    cert = "server.pem"
    key = "server.key"
    client_ca = "clients.pem"     # ask for certificates of these authorities
    alpn = ["h2", "http/1.1"]
    [tls.names."b.example"]       # for those who ask for that name (SNI)
    cert = "b.pem"

    [proxy]                       # whose connections begin with a PROXY protocol header
    trusted = ["10.0.0.0/8", "::1", "unix"]

A key that there isn't and a value of the wrong type are refused, with the key, the value, the file and the line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from reqtable.core.errors import ConfigurationError
from reqtable.core.limits import Limits

if TYPE_CHECKING:
    from ipaddress import IPv4Network, IPv6Network

DISPATCH_VARIABLE = "REQTABLE_DISPATCH"
CONFIG_VARIABLE = "REQTABLE_CONFIG"
_OWN_FILE = "reqtable.toml"
_PROJECT_FILE = "pyproject.toml"
TLS_VERSIONS = ("1.2", "1.3")
_BUILT_IN_EXECUTORS = {"thread", "process", "fork"}
ARGUMENT = "argument"
DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class ThreadOptions:
    """Policy `thread`. None: no bound. Above it, requests wait in the table."""

    threads_max: int | None = None

    def __post_init__(self) -> None:
        _check(self, "thread.")


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """Policy `pool`: the number of its threads."""

    size: int = 8

    def __post_init__(self) -> None:
        _check(self, "pool.")


@dataclass(frozen=True, slots=True)
class ForkOptions:
    """Policy `fork`. None: as the server class says (`max_children`, 40). Above it, requests wait in the table."""

    max_children: int | None = None

    def __post_init__(self) -> None:
        _check(self, "fork.")


@dataclass(frozen=True, slots=True)
class ExecutorOptions:
    """An executor: `factory` is `module:callable`, called with `arguments`; None: a pool of processes.

    What it returns has the interface of `concurrent.futures.Executor`.
    """

    factory: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self, "executor.")
        if self.factory is not None and not all(self.factory.partition(":")):
            raise ConfigurationError(f"executor factory {self.factory!r}: write it as module:callable")


@dataclass(frozen=True, slots=True)
class Certificate:
    """Paths of PEM files: a certificate with its chain, and its key, which may be in the same file."""

    cert: str = ""
    key: str | None = None

    def __post_init__(self) -> None:
        _check(self)
        if not self.cert:
            raise ConfigurationError("cert: name the file of the certificate")


@dataclass(frozen=True, slots=True)
class TLSOptions:
    """TLS of stream servers; without `cert` there is none. `names` has other certificates by the name asked for (SNI).

    With `client_ca`, clients are asked for a certificate of one of its authorities, and served without one only where
    it is not `client_cert_required`. `alpn` is the server's protocols, the most wanted first.
    """

    cert: str | None = None
    key: str | None = None
    names: Mapping[str, Certificate] = field(default_factory=dict)
    client_ca: str | None = None
    client_cert_required: bool = True
    min_version: str = "1.2"
    alpn: tuple[str, ...] = ()
    ciphers: str | None = None  # of TLS 1.2, as OpenSSL's ciphers(1) writes them

    def __post_init__(self) -> None:
        _check(self, "tls.")
        if self.min_version not in TLS_VERSIONS:
            raise ConfigurationError(
                f"tls.min_version must be one of {', '.join(TLS_VERSIONS)}, not {self.min_version!r}"
            )
        for protocol in self.alpn:
            if not 0 < len(protocol.encode()) < 256:
                raise ConfigurationError(f"tls.alpn has {protocol!r}: a protocol's name has 1 to 255 bytes")
        for name, value in (("key", self.key), ("names", self.names), ("client_ca", self.client_ca)):
            if value and self.cert is None:
                raise ConfigurationError(f"tls.{name} is given, but no tls.cert: name the certificate's file there")


@dataclass(frozen=True, slots=True)
class ProxyOptions:
    """From whom a connection begins with a PROXY protocol header, and only from them.

    `trusted` are addresses and networks of IP; `unix` is everyone who comes by a Unix socket.
    """

    trusted: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(self, "proxy.")
        self.networks()

    def networks(self) -> list[IPv4Network | IPv6Network]:
        """The networks of IP among them."""
        from ipaddress import ip_network  # only who has proxies needs it

        found = []
        for each in self.trusted:
            if each != "unix":
                try:
                    found.append(ip_network(each))
                except ValueError as error:
                    raise ConfigurationError(
                        f"proxy.trusted has {each!r}: {error}: write 10.0.0.1, 10.0.0.0/8, fd00::/8 or unix"
                    ) from None
        return found


@dataclass(frozen=True, slots=True)
class Config:
    """The configuration of a server. `call_on` is where a `call` runs that does not say; `executors` are its own names.

    `workers` is how many processes serve where `serve()` does; None: the one that calls it.
    `origins` says for each key that was set where its value came from. Raises ConfigurationError, naming the key, for
    a value that can't be.
    """

    dispatch: str | None = None
    call_on: str = "thread"
    workers: int | None = None
    limits: Limits = field(default_factory=Limits)
    thread: ThreadOptions = field(default_factory=ThreadOptions)
    pool: PoolOptions = field(default_factory=PoolOptions)
    fork: ForkOptions = field(default_factory=ForkOptions)
    executor: ExecutorOptions = field(default_factory=ExecutorOptions)
    executors: Mapping[str, ExecutorOptions] = field(default_factory=dict)
    tls: TLSOptions = field(default_factory=TLSOptions)
    proxy: ProxyOptions = field(default_factory=ProxyOptions)
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        _check(self, origins=self.origins)
        for name in _BUILT_IN_EXECUTORS & self.executors.keys():
            place = self.origins.get(f"executors.{name}.factory", ARGUMENT)
            where = "" if place == ARGUMENT else f"{place}: "
            raise ConfigurationError(f"{where}executors.{name}: {name!r} is built in: choose another name")

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        dispatch: str | None = None,
        workers: int | None = None,
    ) -> Config:
        """Read the configuration: `path`, or the file that `REQTABLE_CONFIG` names, or `reqtable.toml`, or the table
        `[tool.reqtable]` of `pyproject.toml`, whichever is there first; with none of them, the defaults.

        `dispatch`, `workers` and `REQTABLE_DISPATCH` are stronger than the file. Raises ConfigurationError: one line
        with the key, the value, the file and the line.
        """
        return _load(path, dispatch, workers)


def from_environment() -> Config:
    """What a server that was given no configuration uses: the file that `REQTABLE_CONFIG` names, or the defaults."""
    return Config.load() if os.environ.get(CONFIG_VARIABLE) else Config()


def given_or_found(config: Any) -> Config:
    """`config`, or, if that is None, what the environment names. Raises ConfigurationError where it is no Config."""
    if config is None:
        return from_environment()
    if not isinstance(config, Config):
        raise ConfigurationError(f'config must be a Config, such as Config.load("reqtable.toml"), not {config!r}')
    return config


def chosen_dispatch(argument: str | None, config: Config, attribute: str) -> tuple[str, str]:
    """The policy's name by the order of precedence, and where it came from."""
    if argument:
        return argument, ARGUMENT
    if config.dispatch and config.origins.get("dispatch") == ARGUMENT:
        return config.dispatch, ARGUMENT
    if named := os.environ.get(DISPATCH_VARIABLE):
        return named, f"environment {DISPATCH_VARIABLE}"
    if config.dispatch is not None:
        return config.dispatch, config.origins.get("dispatch", "configuration")
    return attribute, DEFAULT


# -- the types of the values ------------------------------------------------------------------------------------------

_KINDS = {str: "a string", int: "a whole number above 0", bool: "true or false", tuple: "a list", Mapping: "a mapping"}
_EXAMPLES = {
    "dispatch": '"pool"',
    "call_on": '"thread"',
    "limits": "Limits(entries_max=1000)",
    "thread": "ThreadOptions(threads_max=200)",
    "pool": "PoolOptions(size=8)",
    "fork": "ForkOptions(max_children=40)",
    "executor": 'ExecutorOptions(factory="module:callable")',
    "executors": '{"cluster": ExecutorOptions(factory="module:callable")}',
    "factory": '"module:callable"',
    "arguments": '{"max_workers": 4}',
    "tls": 'TLSOptions(cert="server.pem")',
    "cert": '"server.pem"',
    "key": '"server.key"',
    "names": '{"b.example": Certificate("b.pem")}',
    "client_ca": '"clients.pem"',
    "min_version": '"1.3"',
    "alpn": '["h2", "http/1.1"]',
    "ciphers": '"ECDHE+AESGCM"',
    "proxy": 'ProxyOptions(trusted=["10.0.0.0/8"])',
    "trusted": '["10.0.0.0/8", "unix"]',
    "origins": '{"dispatch": "argument"}',
}


def _check(options: Any, prefix: str = "", origins: Mapping[str, str] | None = None) -> None:
    """Raise ConfigurationError for the first field whose value is not of the field's type.

    The error names the field (after `prefix`, and after its place among `origins`), and shows a value that it takes.
    """
    for name, hint in _hints(options.__class__).items():
        value = getattr(options, name)
        if not _fits(value, hint):
            place = (origins or {}).get(name, ARGUMENT)
            where = "" if place == ARGUMENT else f"{place}: "
            raise ConfigurationError(
                f"{where}{prefix}{name} must be {_kind(name, hint)}, not {value!r}{_mend(value, hint)}"
            )


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type. Whole numbers are counts, so above 0; a list is as good as a tuple."""
    if hint is Any:
        return True
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return any(_fits(value, each) for each in arguments)
    if origin is tuple:
        return isinstance(value, tuple | list) and all(_fits(each, arguments[0]) for each in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(_fits(each, arguments[1]) for each in value.values())
    return isinstance(value, hint)


def _kind(name: str, hint: Any) -> str:
    """What a field takes, in words, with an example where the words alone leave a doubt."""
    hint = get_args(hint)[0] if get_origin(hint) is UnionType else hint
    kind = _KINDS.get(get_origin(hint) or hint) or hint.__name__
    return f"{kind}, such as {_EXAMPLES[name]}" if name in _EXAMPLES else kind


def _mend(value: Any, hint: Any) -> str:
    """A value that is no number at all may have been meant to say that there is no bound."""
    return " (or leave it out)" if type(None) in get_args(hint) and not isinstance(value, int) else ""


# -- the file ---------------------------------------------------------------------------------------------------------


class _File:
    """One file: its keys, and where in it they are."""

    def __init__(self, path: Path) -> None:
        import tomllib  # only reading a file needs it

        self.name = str(path)
        try:
            self._text = path.read_text("utf-8")
            document = tomllib.loads(self._text)
        except OSError as error:
            raise ConfigurationError(f"{path}: {(error.strerror or str(error)).lower()}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{path}: not TOML: {error}") from error
        self.prefix = ("tool", "reqtable") if path.name == _PROJECT_FILE else ()
        self.table: Any = document
        for key in self.prefix:
            self.table = self.table.get(key) if isinstance(self.table, dict) else None

    def place(self, key: tuple[str, ...]) -> str:
        """`file:line` of a key, or the file alone where it can't be told."""
        line = _line_of(self._text, self.prefix + key)
        return f"{self.name}:{line}" if line else self.name


def _load(path: str | os.PathLike[str] | None, dispatch: str | None, workers: int | None) -> Config:
    """See `Config.load`."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    file = _find(path)
    if file is not None and file.table is not None:
        values = _checked(Config, file.table, (), file, origins)
    if named := os.environ.get(DISPATCH_VARIABLE):
        values["dispatch"], origins["dispatch"] = named, f"environment {DISPATCH_VARIABLE}"
    if dispatch:
        values["dispatch"], origins["dispatch"] = dispatch, ARGUMENT
    if workers is not None:
        values["workers"], origins["workers"] = workers, ARGUMENT
    return Config(**values, origins=origins)


def effective(config: Config) -> Iterator[tuple[str, Any, str]]:
    """Every key of a configuration, its value in `reqtable serve`, and where that came from."""
    yield "dispatch", *chosen_dispatch(None, config, "inline")
    for key, value, origin in _flat(config, "", config.origins):
        if key == "tls.client_cert_required" and config.tls.client_ca is None:
            yield key, False, "without tls.client_ca"
        elif key != "dispatch":
            yield key, value, origin


def _flat(part: Any, prefix: str, origins: Mapping[str, str]) -> Iterator[tuple[str, Any, str]]:
    named = part if isinstance(part, Mapping) else {each.name: getattr(part, each.name) for each in fields(part)}
    for name, value in named.items():
        key = prefix + name
        if key == "origins":
            continue
        if is_dataclass(value) or (isinstance(value, Mapping) and any(is_dataclass(each) for each in value.values())):
            yield from _flat(value, key + ".", origins)
        elif not (isinstance(value, Mapping) and not value):
            yield key, dict(value) if isinstance(value, Mapping) else value, origins.get(key, DEFAULT)


def _find(path: str | os.PathLike[str] | None) -> _File | None:
    """The file that was named, which must be there, or one of those that are looked for."""
    if path is not None:
        return _File(Path(path))
    if named := os.environ.get(CONFIG_VARIABLE):
        try:
            return _File(Path(named))
        except ConfigurationError as error:
            raise ConfigurationError(f"environment {CONFIG_VARIABLE}: {error}") from error
    if Path(_OWN_FILE).is_file():
        return _File(Path(_OWN_FILE))
    if Path(_PROJECT_FILE).is_file():
        project = _File(Path(_PROJECT_FILE))
        return project if project.table is not None else None
    return None


def _checked(kind: Any, table: Any, key: tuple[str, ...], file: _File, origins: dict[str, str]) -> dict[str, Any]:
    """The values of a table of the file, by the fields of `kind`. Their types are checked when the object is made."""
    if not isinstance(table, dict):
        raise ConfigurationError(f"{file.place(key)}: {_dotted(key) or 'reqtable'} must be a table, not {table!r}")
    types = {name: hint for name, hint in _hints(kind).items() if name != "origins"}
    values = {}
    for name, value in table.items():
        here = (*key, name)
        if name not in types:
            import difflib

            near = difflib.get_close_matches(name, types, n=1)
            mend = f"did you mean {near[0]}?" if near else f"there are {', '.join(types)}"
            raise ConfigurationError(f"{file.place(here)}: there is no key {_dotted(here)} (= {value!r}): {mend}")
        values[name] = _value(types[name], value, here, file, origins)
    return values


def _value(hint: Any, value: Any, key: tuple[str, ...], file: _File, origins: dict[str, str]) -> Any:
    if is_dataclass(hint):
        return _made(hint, value, key, file, origins)
    if get_origin(hint) is Mapping and is_dataclass(kind := get_args(hint)[1]):
        if not isinstance(value, dict):
            raise ConfigurationError(f"{file.place(key)}: {_dotted(key)} must be a table, not {value!r}")
        return {name: _made(kind, each, (*key, name), file, origins) for name, each in value.items()}
    origins[_dotted(key)] = file.place(key)
    return tuple(value) if get_origin(hint) is tuple and isinstance(value, list) else value


def _made(kind: Any, table: Any, key: tuple[str, ...], file: _File, origins: dict[str, str]) -> Any:
    """An object of `kind` from its table. What it says of a value is said of the key's place."""
    values = _checked(kind, table, key, file, origins)
    try:
        return kind(**values)
    except (ValueError, ConfigurationError) as error:
        [at, *_] = [name for name in values if re.search(rf"\b{name}\b", str(error))] or [""]
        raise ConfigurationError(f"{file.place((*key, at) if at else key)}: {error}") from error


def _dotted(key: tuple[str, ...]) -> str:
    return ".".join(key)


def _line_of(text: str, key: tuple[str, ...]) -> int | None:
    """The line on which a key is given its value, or its table begins. None for a spelling that this does not know."""
    if '"""' in text or "'''" in text:
        return None  # what looks like a key may stand in a string
    table: tuple[str, ...] = ()
    opened = None
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[([^\[\]]+)\]", line):
            table = _parts(header[1])
            if opened is None and table[: len(key)] == key:
                opened = number
        elif assignment := re.match(r"""\s*([\w.\-"' ]+?)\s*=""", line):
            given = table + _parts(assignment[1])
            if given == key or key[: len(given)] == given:  # the key itself, or the inline table that it is in
                return number
    return opened


def _parts(dotted: str) -> tuple[str, ...]:
    parts = re.findall(r"""\s*("[^"]*"|'[^']*'|[^."']+)""", dotted)
    return tuple(part.strip().strip("\"'") for part in parts)
