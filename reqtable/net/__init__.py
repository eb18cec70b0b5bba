"""Sockets: listening, what comes before a request, and the transports that receive and send for a request."""
