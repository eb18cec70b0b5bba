"""HTTP suites that others wrote, sent over sockets: `python -m tests.http_suites`."""
