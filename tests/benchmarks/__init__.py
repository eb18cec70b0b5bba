"""What is measured: scripts that print their figures. Each is run by hand: `python -m tests.benchmarks.<name>`."""
