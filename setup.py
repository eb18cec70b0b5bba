"""What pyproject.toml can't say: the package's one extension module, and the page that an index shows."""

import os
import re
from pathlib import Path

from setuptools import Extension, setup

# If the module can't be built, for example because there is no compiler, the package is built without the module.
# With REQTABLE_PURE=1 there is no module to build, so the wheel is one for every platform (py3-none-any).
is_pure = os.environ.get("REQTABLE_PURE", "0") not in ("", "0")
lean = Extension("reqtable._lean", ["reqtable/lean.c"], extra_compile_args=["-O2"], optional=True)

# An index shows the page alone. A link to another file of the repository becomes its text, a picture disappears.
page = Path("README.md").read_text(encoding="utf-8")
page = re.sub(r"!\[[^]]*\]\((?!https?:)[^)]*\)", "", page)
page = re.sub(r"\[([^]]*)\]\((?!https?:)[^)]*\)", r"\1", page)

setup(ext_modules=[] if is_pure else [lean], long_description=page, long_description_content_type="text/markdown")
