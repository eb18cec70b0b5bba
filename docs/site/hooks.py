"""What mkdocs calls when it builds the site.

A page names a generated part on a line of its own, as in `<!-- generated: metrics -->`. `PARTS` has them all.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from docs.site.binds import binds
from docs.site.commands import commands
from docs.site.configuration import configuration
from docs.site.machines import machines
from docs.site.metrics import metrics
from docs.site.navigation import expanded
from docs.site.states import endings, events, states, transition_diagram, transitions

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
PARTS: dict[str, Callable[[], str]] = {
    "binds": binds,
    "commands": commands,
    "configuration": configuration,
    "endings": endings,
    "events": events,
    "machines": machines,
    "metrics": metrics,
    "states": states,
    "transition diagram": transition_diagram,
    "transitions": transitions,
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of a folder into the navigation."""
    assert config.nav is not None
    config.nav = expanded(config.nav)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the examples, so that pages can link to them."""
    for path in sorted(EXAMPLES.glob("**/*.*")):
        if path.suffix != ".pyc":
            name = path.relative_to(EXAMPLES.parent).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the text of a page as mkdocs needs it: with its generated parts, and with links that stay in the site."""
    text = re.sub(r"^<!-- generated: (.+) -->$", lambda found: PARTS[found[1]](), markdown, flags=re.MULTILINE)
    text = re.sub(
        r"^( *```\w+) (?!title=).+$", r"\1", text, flags=re.MULTILINE
    )  # a label, by which a test finds the block
    return re.sub(r"\]\((?:\.\./)+examples/", "](../examples/", text)
