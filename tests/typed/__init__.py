"""Programs for type checkers, which tests/test_types.py runs: right lines, and wrong lines that must be marked."""
