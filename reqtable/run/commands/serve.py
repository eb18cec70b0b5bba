"""`reqtable serve`."""

from __future__ import annotations

from typing import Any

import click

from reqtable.run.commands.handler_class import HandlerClass, Served
from reqtable.run.commands.serving import Serving, serve_as, serving_options


@click.command("serve")
@click.argument("served", type=Served(), metavar="HANDLER")
@click.option("--handler", type=HandlerClass(), help="The handler class, if HANDLER is a server class that needs one.")
@serving_options("tcp://127.0.0.1:7000")
def serve_command(served: Any, handler: Any, serving: Serving) -> None:
    """Serve HANDLER until SIGINT or SIGTERM. SIGTERM lets requests in progress finish.

    HANDLER is a handler class as module:Class or path/to/file.py:Class. It may also be a server class, or a function
    that makes a server from an address.

    SIGHUP re-reads the configuration, SIGUSR1 logs the table, SIGUSR2 moves all requests to the next version of the
    program. With workers, SIGTTIN adds one, and SIGTTOU removes one.
    """
    serve_as(served, serving, handler)
