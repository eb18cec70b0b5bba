"""Runs the `reqtable` command as `python -m reqtable`."""

from reqtable.run.cli import main

main()
