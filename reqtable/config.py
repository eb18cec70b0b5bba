"""What can be configured: `Config`, its defaults, and which of several sources wins. `configfile` reads the files.

Strongest first: a state's own `dispatch=`; the constructor's argument; `REQTABLE_DISPATCH` in the environment; the
configuration; the class attribute `dispatch`, which a mix-in sets; the default.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from reqtable.core.errors import ConfigurationError
from reqtable.core.limits import Limits

DISPATCH_VARIABLE = "REQTABLE_DISPATCH"
CONFIG_VARIABLE = "REQTABLE_CONFIG"
ARGUMENT = "argument"
DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class ThreadOptions:
    """Policy `thread`. None: no bound. Above it, requests wait in the table."""

    threads_max: int | None = None

    def __post_init__(self) -> None:
        _count("thread.threads_max", self.threads_max)


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """Policy `pool`: the number of its threads."""

    size: int = 8

    def __post_init__(self) -> None:
        _count("pool.size", self.size, or_none=False)


@dataclass(frozen=True, slots=True)
class ForkOptions:
    """Policy `fork`. None: as the server class says (`max_children`, 40). Above it, requests wait in the table."""

    max_children: int | None = None

    def __post_init__(self) -> None:
        _count("fork.max_children", self.max_children)


@dataclass(frozen=True, slots=True)
class ExecutorOptions:
    """An executor: `factory` is `module:callable`, called with `arguments`; None: a pool of processes.

    What it returns has the interface of `concurrent.futures.Executor`.
    """

    factory: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.factory is not None and not all(self.factory.partition(":")):
            raise ConfigurationError(f"executor factory {self.factory!r}: write it as module:callable")


@dataclass(frozen=True, slots=True)
class Config:
    """The configuration of a server. `call_on` is where a `call` runs that does not say; `executors` are its own names.

    `origins` says for each key that was set where its value came from. Raises ConfigurationError, naming the key, for
    a value that can't be.
    """

    dispatch: str | None = None
    call_on: str = "thread"
    limits: Limits = field(default_factory=Limits)
    thread: ThreadOptions = field(default_factory=ThreadOptions)
    pool: PoolOptions = field(default_factory=PoolOptions)
    fork: ForkOptions = field(default_factory=ForkOptions)
    executor: ExecutorOptions = field(default_factory=ExecutorOptions)
    executors: Mapping[str, ExecutorOptions] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None = None, *, dispatch: str | None = None) -> Config:
        """Read the configuration: `path`, or the file that `REQTABLE_CONFIG` names, or `reqtable.toml`, or the table
        `[tool.reqtable]` of `pyproject.toml`, whichever is there first; with none of them, the defaults.

        `dispatch` and `REQTABLE_DISPATCH` are stronger than the file. Needs the package msgspec. Raises
        ConfigurationError: one line with the key, the value, the file and the line.
        """
        from reqtable import configfile

        return configfile.load(path, dispatch)


def from_environment() -> Config:
    """What a server that was given no configuration uses: the file that `REQTABLE_CONFIG` names, or the defaults."""
    return Config.load() if os.environ.get(CONFIG_VARIABLE) else Config()


def chosen_dispatch(argument: str | None, config: Config, attribute: str) -> tuple[str, str]:
    """The policy's name by the order of precedence, and where it came from."""
    if argument:
        return argument, ARGUMENT
    if config.dispatch and config.origins.get("dispatch") == ARGUMENT:
        return config.dispatch, ARGUMENT
    if named := os.environ.get(DISPATCH_VARIABLE):
        return named, f"environment {DISPATCH_VARIABLE}"
    if config.dispatch:
        return config.dispatch, config.origins.get("dispatch", "configuration")
    return attribute, DEFAULT


def _count(name: str, value: int | None, or_none: bool = True) -> None:
    if value is None and or_none:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigurationError(f"{name} must be a whole number above 0, not {value!r}")
