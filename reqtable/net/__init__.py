"""Sockets: listeners, connection preambles, and the transports that receive and send for a request."""
