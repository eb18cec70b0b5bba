"""`serve()` takes a handler class, a server class, or a function that makes a server from an address."""

from __future__ import annotations

import errno
import inspect
import socket
import sys
from collections.abc import Iterable
from typing import Any

from reqtable.config import Config, chosen_dispatch
from reqtable.dispatch import check_policy
from reqtable.dispatch.policies.greenlet import policy_for_blocking
from reqtable.run.endpoints import Endpoint
from reqtable.run.listening import make_server, remover
from reqtable.run.placed import NO_HOST, PlacedClass, blamed_on
from reqtable.server.base import LoopServer
from reqtable.server.classes import TCPServer
from reqtable.server.configured import ConfiguredServer, preamble_of, reconfigure
from reqtable.server.mixins import TableMixIn
from reqtable.table.addresses import address_text
from reqtable.table.errors import ConfigurationError
from reqtable.table.snapshot import handler_name, unwrapped
from reqtable.table.tracebacks import account_of

# The names that the loop's side of a server defines for programs. A class that knows nothing of it keeps its own.
_OWN_NAMES = ("config", "dispatch", "engine", "table", "stats", "drain", "reconfigure")
_KINDS = {
    socket.SOCK_STREAM: ("connections", "tcp:// or unix://"),
    socket.SOCK_DGRAM: ("datagrams", "udp:// or unixgram://"),
}


def is_server_class(thing: Any) -> bool:
    """Return whether `thing` is a server class, ours or one derived from `socketserver`'s, or a partial of one."""
    own = unwrapped(thing)
    return isinstance(own, type) and issubclass(own, _server_classes())


def is_server_function(thing: Any) -> bool:
    """Return whether `thing` is a function that can be called with an address alone.

    A function that takes any arguments is none: it may make a handler, as in `socketserver`.
    """
    own = unwrapped(thing)
    if isinstance(own, type) or not callable(own):
        return False
    signature = _signature(thing)
    if signature is None or any(each.kind is each.VAR_POSITIONAL for each in signature.parameters.values()):
        return False
    return _mismatch(signature, 1) is None


def why_not_served(thing: Any, name: str) -> str | None:
    """Return why a server that exists can't be served; None if `thing` is none."""
    if not isinstance(thing, _server_classes()):
        return None
    return (
        f"{name} is a server that was made for an address of its own: give its class, or a function that makes a "
        f"{type(thing).__name__} from an address"
    )


class HandlerMaker:
    """Makes the servers of a handler class."""

    def __init__(self, handler: Any) -> None:
        self.handler = handler

    def check(self, endpoints: Iterable[Endpoint], dispatch: str | None, config: Config) -> None:
        """Do nothing: the servers are not bound when they are made."""

    def make(self, endpoint: Endpoint, dispatch: str | None, config: Config) -> Any:
        """Return a new server for `endpoint`."""
        return make_server(endpoint, self.handler, dispatch, config)

    def name_of(self, server: Any) -> str:
        """Return the name under which `server` is logged."""
        return handler_name(self.handler)


class ServerMaker:
    """Makes servers by a server class, or by a function that makes a server: one for each endpoint."""

    def __init__(self, served: Any, handler: Any) -> None:
        self._served = served
        self._class = unwrapped(served) if is_server_class(served) else None
        self._name = handler_name(served)
        self._handler = () if handler is None else (handler,)
        self._made: list[Any] = []
        if self._class is not None:
            self._check_class(self._class)
            self._check_call(handler)

    def _check_class(self, own: type) -> None:
        if getattr(self._served, "args", ()):
            raise ConfigurationError(
                f"{self._name}: its partial gives arguments by position, but the address is the first one: name them, "
                f"as in partial({self._name}, RequestHandlerClass=…)"
            )
        if not all(hasattr(own, name) for name in ("server_bind", "server_activate", "socket_type")):
            raise ConfigurationError(
                f"{self._name} has no socket that serve() can bind: derive it from TCPServer or UDPServer"
            )

    def _check_call(self, handler: Any) -> None:
        """Raise ConfigurationError if the class can't be made from an address, and a handler class if one is given."""
        signature = _signature(self._served)
        problem = None if signature is None else _mismatch(signature, 1 + len(self._handler))
        if signature is None or problem is None:
            return
        if handler is None and _mismatch(signature, 2) is None:
            raise ConfigurationError(
                f"{self._name} needs a handler class: give it by --handler module:Class, or in "
                f"serve({self._name}, …, handler=Class)"
            )
        given = "an address" if handler is None else "an address and a handler class"
        raise ConfigurationError(
            f"{self._name} can't be made from {given}: {problem}: give serve() a function that makes it, as in "
            f"def make(address): return {self._name}(address, …, bind_and_activate=False)"
        )

    def check(self, endpoints: Iterable[Endpoint], dispatch: str | None, config: Config) -> None:
        """Raise ConfigurationError for what can be known before a constructor binds."""
        check_policy(*chosen_dispatch(dispatch, config, policy_for_blocking()))
        for endpoint in endpoints:
            preamble_of(endpoint.bind.configured(config))
            if self._class is not None:
                self._check_kind(self._class, endpoint)

    def _check_kind(self, own: Any, endpoint: Endpoint) -> None:
        if own.socket_type != endpoint.kind and own.socket_type in _KINDS:
            what, schemes = _KINDS[own.socket_type]
            raise endpoint.bind.error(f"{self._name} serves {what}: write {schemes}")

    def make(self, endpoint: Endpoint, dispatch: str | None, config: Config) -> Any:
        """Return a new server for `endpoint`. Its constructor may have bound it.

        Raises ConfigurationError, and OSError as its `server_bind` does.
        """
        if self._class is not None:
            server = self._constructed(self._class, endpoint, dispatch, config)
        else:
            server = self._adopted(endpoint, dispatch, config)
        server._handler_is_known()
        self._made.append(server)
        return server

    def name_of(self, server: Any) -> str:
        """Return the name under which `server` is logged."""
        return type(server).__name__

    def _constructed(self, own: Any, endpoint: Endpoint, dispatch: str | None, config: Config) -> Any:
        made: Any = _placed_class(own, endpoint, dispatch, config)
        arguments = (NO_HOST if made._sees_host else endpoint.address, *self._handler)
        named = getattr(self._served, "keywords", {})
        server = made.__new__(made, *arguments, **named)
        try:
            server.__init__(*arguments, **named)
            if server._engine is None:
                raise ConfigurationError(f"{self._name}: its constructor does not call super().__init__(…): call it")
            return server
        except BaseException as error:
            _drop(server)
            if isinstance(error, ConfigurationError) or not isinstance(error, Exception) or _is_blamed(error, endpoint):
                raise
            raise ConfigurationError(f"{self._name} can't be made: {account_of(error)}") from error

    def _adopted(self, endpoint: Endpoint, dispatch: str | None, config: Config) -> Any:
        """Call the function, and give the server that it makes a class with the loop's side, and with the endpoint."""
        server = self._returned(endpoint)
        if any(server is each for each in self._made):
            raise ConfigurationError(f"{self._name} has returned one server for two binds: make a new one in each call")
        try:
            self._check_class(type(server))
            self._check_kind(server, endpoint)
            self._check_place(server, endpoint)
            self._adopt(server, endpoint, dispatch, config)
        except BaseException:
            server.server_close()
            raise
        return server

    def _check_place(self, server: Any, endpoint: Endpoint) -> None:
        """Close the socket of a server that was bound where it should be: `server_bind` makes another one there.

        Raises ConfigurationError if the server was bound elsewhere.
        """
        if server.socket.fileno() < 0:
            return
        place, wanted = server.socket.getsockname(), endpoint.address
        if not (place[1] if isinstance(place, tuple) else place):
            return  # it is not bound
        if isinstance(place, tuple) and isinstance(wanted, tuple) and not wanted[1]:
            wanted = (wanted[0], place[1], *wanted[2:])  # any port will do
        if place != wanted:
            raise ConfigurationError(
                f"{self._name} has bound its server to {address_text(place)}, not to the address that it was given: "
                f"{_LEAVE_UNBOUND}"
            )
        server.socket.close()

    def _returned(self, endpoint: Endpoint) -> Any:
        """Return what the function returns, which is a server. Raises ConfigurationError."""
        try:
            server: Any = self._served(endpoint.address, *self._handler)
        except Exception as error:
            is_elsewhere = (
                isinstance(error, OSError) and error.errno == errno.EADDRINUSE and endpoint.descriptor is None
            )
            if is_elsewhere and _happened_in(error, "server_bind"):
                with blamed_on(endpoint):
                    raise
            mend = f": {_LEAVE_UNBOUND}" if _happened_in(error, "server_bind") else ""
            raise ConfigurationError(f"{self._name} can't make a server: {account_of(error)}{mend}") from error
        if not isinstance(server, _server_classes()):
            raise ConfigurationError(
                f"{self._name} has returned {type(server).__name__}, not a server: have it return the server"
            )
        return server

    def _adopt(self, server: Any, endpoint: Endpoint, dispatch: str | None, config: Config) -> None:
        server.__class__ = _placed_class(type(server), endpoint, dispatch, config)
        if "_policies" not in vars(server):
            server._configure(None, None)
            server._check_handler(server.RequestHandlerClass)
        else:  # the class has the loop's side, so the constructor has configured it
            server._dispatch_argument = dispatch or server._dispatch_argument
            reconfigure([server], config)


_LEAVE_UNBOUND = "serve() binds it: pass bind_and_activate=False to its constructor"


def maker_of(served: Any, handler: Any) -> HandlerMaker | ServerMaker:
    """Return what makes the servers of `served`. Raises ConfigurationError if it can't be served with that handler."""
    if (reason := why_not_served(served, type(served).__name__)) is not None:
        raise ConfigurationError(reason)
    if handler is not None and is_server_class(handler):
        raise ConfigurationError(
            f"{handler_name(handler)} is a server class, not a handler class: give it in the place of "
            f"{handler_name(served)}"
        )
    if is_server_class(served) or is_server_function(served) or (handler is not None and takes_two(served)):
        return ServerMaker(served, handler)
    if handler is not None:
        raise ConfigurationError(
            f"{handler_name(served)} is no server class, so {handler_name(handler)} can't be its handler: leave one out"
        )
    return HandlerMaker(served)


def takes_two(thing: Any) -> bool:
    """Return whether `thing` is a function, or an object, that can be called with two arguments.

    It may be one that makes a server from an address and a handler class, or a WSGI application.
    """
    signature = None if isinstance(unwrapped(thing), type) or not callable(thing) else _signature(thing)
    return signature is not None and _mismatch(signature, 2) is None


def _server_classes() -> tuple[type, ...]:
    # Not imported here: a class derived from `socketserver`'s has imported the module, or what replaces it.
    standard = sys.modules.get("socketserver")
    return (LoopServer,) if standard is None else (LoopServer, standard.BaseServer)


def _placed_class(own: Any, endpoint: Endpoint, dispatch: str | None, config: Config) -> Any:
    """Derive a class from `own` that binds at `endpoint`, and is configured by `serve()`."""
    is_ours = issubclass(own, LoopServer)
    sees_host = own.address_family != endpoint.family and not isinstance(endpoint.address, tuple)
    named: dict[str, Any] = {
        "__module__": own.__module__,
        "address_family": endpoint.family,
        "_endpoint": endpoint,
        "_asked": dispatch,
        "_given_config": config,
        "_sees_host": sees_host,
    }
    if is_ours:
        owner = next(each for each in own.__mro__ if "dispatch" in vars(each))
        named["_chooses_policy"] = owner is not ConfiguredServer
    else:
        named |= {name: inspect.getattr_static(own, name) for name in _OWN_NAMES if hasattr(own, name)}
        if own.request_queue_size != TCPServer.request_queue_size:
            named["request_queue_size"] = own.request_queue_size
    if endpoint.kind == socket.SOCK_STREAM:
        named["allow_reuse_address"] = True
    return type(own)(own.__name__, (PlacedClass, own) if is_ours else (PlacedClass, TableMixIn, own), named)


def _signature(thing: Any) -> inspect.Signature | None:
    """Return what `thing` can be called with; None if it does not say.

    The loop's side of a server takes any arguments, and passes them to the class behind it.
    """
    own = unwrapped(thing)
    try:
        if isinstance(own, type):
            owners = [each for each in own.__mro__ if "__init__" in vars(each)]
            own = next(each for each in owners if each.__module__ != TableMixIn.__module__)
            signature = inspect.signature(vars(own)["__init__"])
            named = getattr(thing, "keywords", {})
            left = [each for name, each in signature.parameters.items() if name not in named]
            return signature.replace(parameters=left[1:])
        return inspect.signature(thing)
    except (TypeError, ValueError):  # perhaps written in C
        return None


def _mismatch(signature: inspect.Signature, arguments: int) -> str | None:
    """Return why so many arguments can't be given by position; None if they can."""
    try:
        signature.bind(*range(arguments))
    except TypeError as error:
        return str(error)
    return None


def _is_blamed(error: BaseException, endpoint: Endpoint) -> bool:
    return isinstance(error, OSError) and str(error.strerror).startswith(f"bind {endpoint.bind.text!r}: ")


def _happened_in(error: BaseException, name: str) -> bool:
    """Return whether the error was raised in a function of that name, or in one that it called."""
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_name == name:
            return True
        traceback = traceback.tb_next
    return False


def _drop(server: Any) -> None:
    """Free what a constructor has made that failed."""
    if server._is_bound:
        server.socket.close()
        remover(server)()
    elif hasattr(server, "socket"):
        server.socket.close()
    if server._engine is not None:
        server._end_requests()
