"""`Cluster`: an executor that runs functions on a Dask cluster, and that survives the cluster's scheduler."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from typing import Any

from distributed import Client

_CONNECT_S = 5


class Cluster(Executor):
    """Runs functions on the Dask cluster whose scheduler is at `address`, or at $DASK_SCHEDULER_ADDRESS.

    While the scheduler is away, each call fails at once with a ConnectionError. When the scheduler is back, the calls
    succeed again. The constructor raises OSError if the scheduler is away when the server starts.

    `submit` is called in the server's loop, so it must not wait. A thread of its own makes each further connection.
    """

    def __init__(self, address: str = "") -> None:
        self._address = address or os.environ["DASK_SCHEDULER_ADDRESS"]
        self._lock = threading.Lock()
        self._is_connecting = False
        self._is_shut = False
        self._client = self._connect()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if self._client.status != "running":
            self._connect_again()
            raise ConnectionError(f"the scheduler of the cluster, {self._address}, is away")
        # Not pure, or two requests with the same arguments would share one task, and cancelling one would cancel both.
        future: Future[Any] = self._client.get_executor(pure=False).submit(fn, *args, **kwargs)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        with self._lock:
            self._is_shut = True
        self._client.close()

    def _connect(self) -> Client:
        return Client(self._address, timeout=_CONNECT_S, set_as_default=False)

    def _connect_again(self) -> None:
        """Begin to make another connection, unless the client does so itself, or a thread does already."""
        with self._lock:
            if self._client.status == "closed" and not self._is_connecting and not self._is_shut:
                self._is_connecting = True
                threading.Thread(target=self._replace_client, name="reqtable-call-cluster", daemon=True).start()

    def _replace_client(self) -> None:
        try:
            with suppress(OSError):  # the next call tries again
                client = self._connect()
                with self._lock:
                    if self._is_shut:
                        client.close()
                    else:
                        self._client = client
        finally:
            self._is_connecting = False
