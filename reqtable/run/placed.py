"""Server classes that bind where an endpoint says, by a socket that is placed there, with the permissions of its bind.

A class's own `server_bind` is called as always: it may set options before it binds, and set attributes afterwards, as
`http.server.HTTPServer` sets `server_name`. Only the socket that it calls `bind` on knows the real place.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from reqtable.config import DEFAULT, Config, chosen_dispatch
from reqtable.dispatch import is_resumable
from reqtable.dispatch.policies.greenlet import policy_for_blocking
from reqtable.run.endpoints import Endpoint, reason_of, socket_at
from reqtable.server.classes import bind_over_dead

log = logging.getLogger("reqtable")

_FORBIDDEN = {errno.EACCES, errno.EPERM}
# What a class that expects a host and a port sees in place of a Unix socket's path.
NO_HOST = ("localhost", 0)


class PlacedSocket(socket.socket):
    """Binds to the place of an endpoint, whatever address `bind` is given. A socket that was passed is bound already.

    While a server class binds that expects a host and a port, `shown` is the address that it sees instead of a path.
    """

    _endpoint: Endpoint
    shown: Any = None

    @classmethod
    def of(cls, endpoint: Endpoint) -> PlacedSocket:
        """Make the socket of an endpoint. Raises OSError if the descriptor that was passed is not a socket."""
        if endpoint.descriptor is None:
            own = cls(endpoint.family, endpoint.kind)
        else:
            own = cls(fileno=socket_at(endpoint.descriptor).detach())
        own._endpoint = endpoint
        return own

    def bind(self, _: Any) -> None:
        endpoint = self._endpoint
        if endpoint.descriptor is not None:
            return
        try:
            super().bind(endpoint.address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not bind_over_dead(super().bind, endpoint.address):
                raise

    def getsockname(self) -> Any:
        return super().getsockname() if self.shown is None else self.shown


class Placed:
    """Makes the server class behind it bind to `_endpoint`."""

    _endpoint: Endpoint
    _sees_host = False  # the class expects a host and a port, but is at a Unix socket
    _is_bound = False
    _is_active = False
    _is_given_away = False  # another process has the socket, and its file if it has one
    # Requests have `drain_timeout_s` to end. A thread that never ends must not hold up the exit.
    daemon_threads = True

    if TYPE_CHECKING:  # attributes of the class behind it
        socket: socket.socket
        server_address: Any
        RequestHandlerClass: Any

        def _keep_alive(self) -> None: ...

    def _prepared(self, config: Config) -> tuple[Callable[[], None], Callable[[], None]]:
        return super()._prepared(self._endpoint.bind.configured(config))  # type: ignore[misc,no-any-return]

    def server_bind(self) -> None:
        """Bind. Raises OSError, which names the bind and the mend; ConfigurationError if a permission is missing."""
        endpoint = self._endpoint
        with blamed_on(endpoint):
            self.socket.close()
            self.socket = own = PlacedSocket.of(endpoint)
            if endpoint.descriptor is None and endpoint.family == socket.AF_INET6:  # whatever the machine's default is
                own.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, endpoint.v6only)
            if endpoint.mode is not None:
                with contextlib.suppress(OSError):  # only Linux can; elsewhere streams are safe, as nothing listens yet
                    os.fchmod(own.fileno(), endpoint.mode & 0o700)
            if self._sees_host:
                own.shown = self.server_address = NO_HOST
            super().server_bind()  # type: ignore[misc]
            own.shown = None
            self.server_address = self.socket.getsockname()
            if endpoint.has_file and not endpoint.is_inherited:
                _permit(endpoint)
            self._is_bound = True
            self._is_given_away = endpoint.is_inherited  # until this process listens, it is the other one's
            self._keep_alive()  # not only in workers: the supervisor must know what is set when it reloads

    def server_activate(self) -> None:
        """Listen. Raises what `server_bind` raises."""
        with blamed_on(self._endpoint):
            super().server_activate()  # type: ignore[misc]
            self._is_active = True


class PlacedClass(Placed):
    """Makes a program's server class behind it take its policy and configuration from `serve()`."""

    _asked: str | None = None  # the policy that `serve()` was given
    _given_config: Config
    _chooses_policy = False  # the class behind this one names a policy

    if TYPE_CHECKING:  # attributes of the class behind it
        _policies: Any
        _dispatch_argument: str | None

        def _make_policies_again(self) -> None: ...

    def _configure(self, dispatch: str | None, config: Config | None) -> None:
        if config is not None and "_policies" not in vars(self):
            log.warning(
                "%s: serve() has the configuration; the one in its constructor is not used", type(self).__name__
            )
        own = self._endpoint.bind.configured(self._given_config)
        super()._configure(self._asked or dispatch, own)  # type: ignore[misc]

    def _default_dispatch(self) -> str:
        if self._chooses_policy:
            return super()._default_dispatch()  # type: ignore[misc,no-any-return]
        return "inline" if is_resumable(getattr(self, "RequestHandlerClass", None)) else policy_for_blocking()

    def _handler_is_known(self) -> None:
        """Once the constructor has run: choose the policy again, if it depends on the handler class."""
        if chosen_dispatch(self._dispatch_argument, self._policies.config, "")[1] == DEFAULT:
            self._policies.close(wait=False)
            self._make_policies_again()

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Run a blocking handler. If it expects a host and a port, it gets an empty host for a Unix client."""
        if self._sees_host and not isinstance(client_address, tuple):
            client_address = ("", 0)
        super().finish_request(request, client_address)  # type: ignore[misc]


def _permit(endpoint: Endpoint) -> None:
    """Give the socket's file to its owner and group, then open it to them. Until now, only this user has access."""
    try:
        if (endpoint.owner, endpoint.group) != (-1, -1):
            os.chown(endpoint.address, endpoint.owner, endpoint.group, follow_symlinks=False)
        if endpoint.mode is not None:
            os.chmod(endpoint.address, endpoint.mode)
    except BaseException:
        os.unlink(endpoint.address)
        raise


@contextlib.contextmanager
def blamed_on(endpoint: Endpoint) -> Iterator[None]:
    """Turn an OSError of the block into one that names the endpoint's bind and the mend."""
    try:
        yield
    except OSError as error:
        if error.errno in _FORBIDDEN:
            raise endpoint.bind.error(f"{reason_of(error)}: choose an address that this user may use") from error
        mend = ": choose another one"
        if error.errno == errno.EADDRINUSE:
            from reqtable.net.port_holder import mend_of_use  # only here: most binds succeed

            mend = mend_of_use(endpoint.kind, endpoint.address)
        raise OSError(error.errno, f"bind {endpoint.bind.text!r}: {reason_of(error)}{mend}") from error
