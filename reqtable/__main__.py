"""`python -m reqtable` is the `reqtable` command."""

from reqtable.run.cli import main

main()
