"""`python -m reqtable` is the `reqtable` command."""

from reqtable.cli import main

main()
