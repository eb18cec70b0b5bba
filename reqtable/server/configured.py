"""`ConfiguredServer`: how a server takes its configuration, and replaces it while it serves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from reqtable.config import Config, chosen_dispatch, given_or_found
from reqtable.dispatch.checks import is_resumable
from reqtable.dispatch.policy_set import PolicySet
from reqtable.dispatch.registry import check_policy
from reqtable.handlers.checked import warn_of_doubts
from reqtable.net.preamble import PreambleSpec
from reqtable.server.engine import Engine
from reqtable.server.stats import Counts
from reqtable.table.errors import ConfigurationError
from reqtable.table.snapshot import unwrapped


class ConfiguredServer:
    """Makes what depends on a server's configuration: policies, preamble, limits."""

    dispatch: str = "inline"  # the policy, if nothing stronger names one

    _policies: PolicySet
    _preamble: PreambleSpec | None
    _counts: Counts
    _engine: Engine | None = None
    _dispatch_argument: str | None = None

    def _configure(self, dispatch: str | None, config: Config | None) -> None:
        """Apply the constructor's arguments. Raises ConfigurationError if the server can't be served so."""
        if "_policies" in vars(self):
            return  # the mix-in in front of this class has done it
        self._dispatch_argument = dispatch
        self._counts = Counts()
        self._former: list[PolicySet] = []  # of earlier configurations: older requests end under them
        config = given_or_found(config)
        self._preamble = preamble_of(config)
        self._policies = self._make_policies(config)
        if self._engine is None:
            self._join(Engine(limits=config.limits))

    def reconfigure(self, config: Config) -> None:
        """Serve new requests as `config` says, and read certificates again. Requests in the table go on as before.

        Call it in the loop's own thread, or while no loop runs. Raises ConfigurationError, and changes nothing, if the
        handler can't be served so.
        """
        reconfigure([self], config)

    def _prepared(self, config: Config) -> tuple[Callable[[], None], Callable[[], None]]:
        """Prepare to serve by `config`. Returns two functions: `apply`, and one that drops the preparation.

        Raises ConfigurationError if the handler can't be served so.
        """
        preamble = preamble_of(config)
        policies = self._make_policies(config)
        try:
            policies.check(self.RequestHandlerClass)
        except ConfigurationError:
            policies.close(wait=False)
            raise

        def apply() -> None:
            self._preamble = preamble
            former, self._policies = self._policies, policies
            self._former = [each for each in self._former if each.requests]
            if former.requests:
                self._former.append(former)
            former.retire()
            self._host.steps.set_limits(config.limits)
            self._keep_alive()

        return apply, partial(policies.close, wait=False)

    def _make_policies(self, config: Config) -> PolicySet:
        name, origin = chosen_dispatch(self._dispatch_argument, config, self._default_dispatch())
        check_policy(name, origin)
        return PolicySet(self, self._engine, name, config)

    def _default_dispatch(self) -> str:
        """Return the policy of a server for which nothing else names one."""
        own: object = type(self).dispatch
        return own if isinstance(own, str) else ConfiguredServer.dispatch  # a program may have a method of that name

    def _abandon_policies(self) -> None:
        """In a forked child: abandon the policies, which are the parent's."""
        for policies in (self._policies, *self._former):
            policies.abandon()

    def _check_handler(self, handler_class: Any) -> None:
        try:
            self._policies.check(handler_class)
        except ConfigurationError:
            self._policies.close(wait=False)
            raise
        if is_resumable(handler_class):
            warn_of_doubts(unwrapped(handler_class))

    def _make_policies_again(self) -> None:
        """Replace the policies, which have been closed."""
        self._policies = self._make_policies(self._policies.config)

    if TYPE_CHECKING:  # attributes of `LoopServer`
        RequestHandlerClass: Callable[..., Any]

        @property
        def _host(self) -> Engine: ...
        def _join(self, engine: Engine) -> None: ...
        def _keep_alive(self) -> None: ...


def reconfigure(servers: Iterable[Any], config: Config) -> None:
    """Apply `config` to all `servers`, or to none. Raises ConfigurationError if one of them can't be served so."""
    prepared: list[tuple[Callable[[], None], Callable[[], None]]] = []
    try:
        for server in servers:
            prepared.append(server._prepared(config))
    except ConfigurationError:
        for _, drop in prepared:
            drop()
        raise
    for apply, _ in prepared:
        apply()


def preamble_of(config: Config) -> PreambleSpec | None:
    """Return what connections begin with, or None. Raises ConfigurationError for a certificate that can't be used."""
    return PreambleSpec(config) if config.tls.cert is not None or config.proxy.trusted else None
