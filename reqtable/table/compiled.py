"""A decorator for mypyc. In interpreted code it changes nothing and needs no package.

By default only compiled classes can subclass a compiled class. `allow_interpreted_subclasses=True` lifts that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mypy_extensions import mypyc_attr as mypyc_attr
else:

    def mypyc_attr(**_):
        return lambda cls: cls
