"""What is measured. `make bench` compares servers: `servers` are those, `work` is what they do and what to reach,
`processes` has it done and accounted for, `report` makes tables and the page of it, `__main__` is the command.
`python -m tests.benchmarks.trickle` is a script of its own.
"""
