"""The configuration: what can be set, and where each value comes from."""

from reqtable.config.changes import changed, differences
from reqtable.config.config import (
    CONFIG_VARIABLE,
    DISPATCH_VARIABLE,
    Config,
    chosen_dispatch,
    effective,
    from_environment,
    given_or_found,
)
from reqtable.config.options import (
    ARGUMENT,
    DEFAULT,
    Certificate,
    ControlOptions,
    ExecutorOptions,
    ForkOptions,
    GreenletOptions,
    PoolOptions,
    ProxyOptions,
    RestartOptions,
    ThreadOptions,
    TLSOptions,
)

__all__ = [
    "ARGUMENT",
    "CONFIG_VARIABLE",
    "DEFAULT",
    "DISPATCH_VARIABLE",
    "Certificate",
    "Config",
    "ControlOptions",
    "ExecutorOptions",
    "ForkOptions",
    "GreenletOptions",
    "PoolOptions",
    "ProxyOptions",
    "RestartOptions",
    "TLSOptions",
    "ThreadOptions",
    "changed",
    "chosen_dispatch",
    "differences",
    "effective",
    "from_environment",
    "given_or_found",
]
