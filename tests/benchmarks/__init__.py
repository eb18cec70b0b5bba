"""The benchmarks. `make bench` compares servers: `servers` has the servers, `work` has their work and the goals,
`processes` runs and measures them, `report` makes the tables and the page, and `__main__` is the command.
`tests.benchmarks.trickle`, `trace` and `profile` are separate scripts.
"""
