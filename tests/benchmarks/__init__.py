"""The benchmarks. `make bench` compares servers: `servers` has the servers, `work` has their work and the goals,
`processes` runs and measures them, `report` makes the tables and the page, and `__main__` is the command. `profile`
prints the bytecodes of a request, and its instructions, which `instructions` counts. `tests.benchmarks.looking`,
`trickle` and `trace` are separate scripts.
"""
