"""What suspends a blocking handler under policy `greenlet`: the sockets of its own request."""
