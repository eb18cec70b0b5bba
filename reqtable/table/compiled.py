"""What mypyc is told of a class. Interpreted, it changes nothing and needs no package.

A class that is compiled can be subclassed only by others that are, unless it says otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mypy_extensions import mypyc_attr as mypyc_attr
else:

    def mypyc_attr(**_):
        return lambda cls: cls
