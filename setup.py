"""The package's one extension module. All else about the package is in pyproject.toml."""

from setuptools import Extension, setup

# If the module can't be built, for example because there is no compiler, the package is built without the module.
setup(ext_modules=[Extension("reqtable._lean", ["reqtable/lean.c"], extra_compile_args=["-O2"], optional=True)])
