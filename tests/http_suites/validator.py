"""`wsgiref.validate` around an application, under every policy: the tests of it in tests/test_wsgi.py."""

from __future__ import annotations

import sys

from tests.http_suites.suite import ROOT, Failed, number_in, output_of

_TEST = "tests/test_wsgi.py::test_the_validator_finds_nothing"


def run(quick: bool) -> str:
    code, printed = output_of([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", _TEST], ROOT)
    if code:
        raise Failed(printed[-3000:])
    return f"{number_in(printed, r'([0-9]+) passed')} dialogues under all policies, the validator complains about none"
