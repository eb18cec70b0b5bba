"""The configuration: `Config`, its defaults, its file, and which of several sources wins.

Strongest first: a state's own `dispatch=`; the constructor's argument; `REQTABLE_DISPATCH` in the environment; the
file; the class attribute `dispatch`, which a mix-in sets; the default. The file is `reqtable.toml`, or the table
`[tool.reqtable]` of `pyproject.toml`:

    dispatch = "pool"

    [limits]
    entries_max = 10_000

The text below each field of `Config`, and of the classes in it, says what the key means and when to change it.
An unknown key, or a value of the wrong type, is an error that names the key, the value, the file and the line.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from reqtable.config.file import OWN_FILE, PROJECT_FILE, File, values_of
from reqtable.config.options import (
    ARGUMENT,
    DEFAULT,
    ControlOptions,
    ExecutorOptions,
    ForkOptions,
    GreenletOptions,
    PoolOptions,
    ProxyOptions,
    RestartOptions,
    ThreadOptions,
    TLSOptions,
    check,
)
from reqtable.table.errors import ConfigurationError
from reqtable.table.limits import Limits

DISPATCH_VARIABLE = "REQTABLE_DISPATCH"
"""The environment variable that names the policy."""

CONFIG_VARIABLE = "REQTABLE_CONFIG"
"""The environment variable that names the configuration file."""

_BUILT_IN_EXECUTORS = {"thread", "process", "fork"}


@dataclass(frozen=True, slots=True)
class Config:
    """Holds the configuration of a server.

    Raises ConfigurationError, naming the key, for a value that can't be used.
    """

    dispatch: str | None = None
    """The policy: where handlers run. `REQTABLE_DISPATCH` and `--dispatch` are stronger than the file. None: the server
    class decides, by default `"inline"`; for a blocking handler, `reqtable serve` and `serve()` use `"greenlet"`. Set
    it if a step computes or waits so long that it delays other requests."""

    call_on: str = "thread"
    """Where a `call(…)` without `on` runs: `"thread"`, `"process"`, `"fork"`, or a name in `executors`. Set it to
    `"process"` if the functions compute."""

    workers: int | None = None
    """The number of processes that `serve()` starts; `--workers` is stronger. None: the calling process serves. Set it
    to the number of processors if one process is always busy."""

    takeover: bool = False
    """Whether another worker continues the requests of a worker that has crashed (`--takeover`). It needs `workers`.
    Set it if clients must not be cut off by a crash; each request then costs more."""

    takeover_attempts: int = 1
    """The number of crashes that may cut off the same step of a request; one more ends the request. Raise it if crashes
    have nothing to do with the step."""

    limits: Limits = field(default_factory=Limits)
    """The bounds of an engine."""

    thread: ThreadOptions = field(default_factory=ThreadOptions)
    """The options of policy `thread`."""

    pool: PoolOptions = field(default_factory=PoolOptions)
    """The options of policy `pool`."""

    fork: ForkOptions = field(default_factory=ForkOptions)
    """The options of policy `fork`."""

    greenlet: GreenletOptions = field(default_factory=GreenletOptions)
    """The options of policy `greenlet`."""

    executor: ExecutorOptions = field(default_factory=ExecutorOptions)
    """The executor of policy `executor`."""

    executors: Mapping[str, ExecutorOptions] = field(default_factory=dict)
    """The executors that `on` of a `call(…)` may name, besides the built-in ones."""

    tls: TLSOptions = field(default_factory=TLSOptions)
    """The TLS of stream servers."""

    proxy: ProxyOptions = field(default_factory=ProxyOptions)
    """The proxies in front of the server."""

    control: ControlOptions = field(default_factory=ControlOptions)
    """Where an operator reaches the control API."""

    restart: RestartOptions = field(default_factory=RestartOptions)
    """How the next version of the program takes over."""

    origins: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Where the value of each key that was set came from."""

    def __post_init__(self) -> None:
        check(self, origins=self.origins)
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
        """Read the configuration from one file, or use the defaults if there is none.

        The file is `path`, or else the file that `REQTABLE_CONFIG` names, or else `reqtable.toml`, or else the table
        `[tool.reqtable]` of `pyproject.toml`. `dispatch`, `workers` and `REQTABLE_DISPATCH` override the file.

        Raises ConfigurationError: one line with the key, the value, the file and the line.
        """
        return _load(path, dispatch, workers)


def from_environment() -> Config:
    """Return the configuration for a server that was given none: the file in `REQTABLE_CONFIG`, or the defaults."""
    return Config.load() if os.environ.get(CONFIG_VARIABLE) else Config()


def given_or_found(config: Any) -> Config:
    """Return `config`, or `from_environment()` if it is None. Raises ConfigurationError if it is not a Config."""
    if config is None:
        return from_environment()
    if not isinstance(config, Config):
        raise ConfigurationError(f'config must be a Config, such as Config.load("reqtable.toml"), not {config!r}')
    return config


def chosen_dispatch(argument: str | None, config: Config, attribute: str) -> tuple[str, str]:
    """Return the policy's name, by the order of precedence, and where the name came from."""
    if argument:
        return argument, ARGUMENT
    if config.dispatch and config.origins.get("dispatch") == ARGUMENT:
        return config.dispatch, ARGUMENT
    if named := os.environ.get(DISPATCH_VARIABLE):
        return named, f"environment {DISPATCH_VARIABLE}"
    if config.dispatch is not None:
        return config.dispatch, config.origins.get("dispatch", "configuration")
    return attribute, DEFAULT


def _load(path: str | os.PathLike[str] | None, dispatch: str | None, workers: int | None) -> Config:
    """Do what `Config.load` says."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    file = _find(path)
    if file is not None and file.table is not None:
        values = values_of(Config, file, origins)
    if named := os.environ.get(DISPATCH_VARIABLE):
        values["dispatch"], origins["dispatch"] = named, f"environment {DISPATCH_VARIABLE}"
    if dispatch:
        values["dispatch"], origins["dispatch"] = dispatch, ARGUMENT
    if workers is not None:
        values["workers"], origins["workers"] = workers, ARGUMENT
    return Config(**values, origins=origins)


def _find(path: str | os.PathLike[str] | None) -> File | None:
    """Return the file that was named, which must exist, or else the first default file that exists."""
    if path is not None:
        return File(Path(path))
    if named := os.environ.get(CONFIG_VARIABLE):
        try:
            return File(Path(named))
        except ConfigurationError as error:
            raise ConfigurationError(f"environment {CONFIG_VARIABLE}: {error}") from error
    if Path(OWN_FILE).is_file():
        return File(Path(OWN_FILE))
    if Path(PROJECT_FILE).is_file():
        project = File(Path(PROJECT_FILE))
        return project if project.table is not None else None
    return None


def effective(config: Config) -> Iterator[tuple[str, Any, str]]:
    """Yield every key of a configuration, its value in `reqtable serve`, and where the value came from."""
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
