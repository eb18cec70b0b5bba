"""`reqtable completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")


@click.command("completion", short_help="Code with which a shell completes these commands.")
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion_command(context: click.Context, shell: str) -> None:
    """Print code for SHELL, which then completes commands, options, and the ids of requests.

    \b
    bash: eval "$(reqtable completion bash)"       in ~/.bashrc
    zsh:  eval "$(reqtable completion zsh)"        in ~/.zshrc
    fish: reqtable completion fish | source        in ~/.config/fish/config.fish
    """
    made = get_completion_class(shell)
    assert made is not None
    click.echo(made(context.find_root().command, {}, "reqtable", "_REQTABLE_COMPLETE").source())
