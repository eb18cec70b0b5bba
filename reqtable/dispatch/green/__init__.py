"""Greenlets and sockets that suspend a blocking handler under policy `greenlet`."""
