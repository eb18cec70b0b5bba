"""Moves the requests of a server to another process: the next version of its program, or the successor of a worker."""
