"""`reqtable http`."""

from __future__ import annotations

import os

import click

from reqtable.run.commands.http_options import Adapt, http_options
from reqtable.run.commands.serving import Serving, serve_as, serving_options


@click.command("http")
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False))
@click.option("--no-listing", is_flag=True, help="Answer 403 for a folder without an index file.")
@click.option("--dot-files", is_flag=True, help="Serve names that begin with a dot, too.")
@click.option("--follow-symlinks", is_flag=True, help="Follow symbolic links that lead out of DIR, too.")
@click.option(
    "--cache",
    "cache_s",
    type=click.IntRange(min=0),
    metavar="SECONDS",
    help="The time during which browsers need not ask again for a file; 0: they ask each time.",
)
@serving_options("tcp://127.0.0.1:8000")
@http_options
def http_command(
    folder: str,
    no_listing: bool,
    dot_files: bool,
    follow_symlinks: bool,
    cache_s: int | None,
    serving: Serving,
    limited: Adapt,
) -> None:
    """Serve the files of DIR over HTTP/1.1 until SIGINT or SIGTERM. SIGTERM lets answers in progress finish."""
    from reqtable.http.files import FileRequestHandler  # only this command needs it, and it imports much

    class Files(FileRequestHandler):
        root = os.path.abspath(folder)
        lists_folders = not no_listing
        shows_dot_files = dot_files
        follows_symlinks = follow_symlinks
        cache_seconds = cache_s

    serve_as(Files, serving, adapt=limited)
