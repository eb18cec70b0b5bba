"""The table of unfinished requests: pure data. Nothing here knows a socket, a selector, a thread or the time."""
