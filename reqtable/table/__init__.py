"""The table of unfinished requests: pure data. Nothing here knows of sockets, selectors, threads or the time."""
