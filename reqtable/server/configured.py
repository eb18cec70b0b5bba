"""`ConfiguredServer`: how a server takes its configuration, and takes another one while it serves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from reqtable.config import Config, chosen_dispatch, given_or_found
from reqtable.dispatch.policy_set import PolicySet
from reqtable.dispatch.registry import check_policy
from reqtable.net.preamble import PreambleSpec
from reqtable.server.engine import Engine
from reqtable.server.stats import Counts
from reqtable.table.errors import ConfigurationError


class ConfiguredServer:
    """The part of a server that its configuration makes: policies, preamble, limits."""

    dispatch: str = "inline"

    _policies: PolicySet
    _preamble: PreambleSpec | None
    _counts: Counts
    _engine: Engine | None = None
    _dispatch_argument: str | None = None

    def _configure(self, dispatch: str | None, config: Config | None) -> None:
        """Take what the constructor was given. Raises ConfigurationError where it can't be served so."""
        if "_policies" in vars(self):
            return  # the mix-in in front of this class has been given it
        self._dispatch_argument = dispatch
        self._counts = Counts()
        self._former: list[PolicySet] = []  # those that an earlier configuration chose: their requests end under them
        config = given_or_found(config)
        self._preamble = _preamble_of(config)
        self._policies = self._make_policies(config)
        if self._engine is None:
            self._join(Engine(limits=config.limits))

    def reconfigure(self, config: Config) -> None:
        """Let new requests be served as `config` says, with certificates read again. Those in the table go on as they
        have begun.

        Only for the loop's own thread, or while no loop runs. Raises ConfigurationError, and changes nothing, where the
        handler can't be served so.
        """
        reconfigure([self], config)

    def _prepared(self, config: Config) -> tuple[Callable[[], None], Callable[[], None]]:
        """What has it served as `config` says, and what drops that again. Raises ConfigurationError if it can't be."""
        preamble = _preamble_of(config)
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
        own: object = type(self).dispatch
        attribute = (
            own if isinstance(own, str) else ConfiguredServer.dispatch
        )  # a program may have a method of that name
        name, origin = chosen_dispatch(self._dispatch_argument, config, attribute)
        check_policy(name, origin)
        return PolicySet(self, self._engine, name, config)

    def _abandon_policies(self) -> None:
        """In a forked child: what is the parent's stays the parent's."""
        for policies in (self._policies, *self._former):
            policies.abandon()

    def _check_handler(self, handler_class: Any) -> None:
        try:
            self._policies.check(handler_class)
        except ConfigurationError:
            self._policies.close(wait=False)
            raise

    def _make_policies_again(self) -> None:
        """The one there was has been closed."""
        self._policies = self._make_policies(self._policies.config)

    if TYPE_CHECKING:  # what a `LoopServer` has
        RequestHandlerClass: Any

        @property
        def _host(self) -> Engine: ...
        def _join(self, engine: Engine) -> None: ...
        def _keep_alive(self) -> None: ...


def reconfigure(servers: Iterable[Any], config: Config) -> None:
    """Have all of them served as `config` says, or none. Raises ConfigurationError."""
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


def _preamble_of(config: Config) -> PreambleSpec | None:
    return PreambleSpec(config) if config.tls.cert is not None or config.proxy.trusted else None
