"""Servers: the classes of `socketserver`, the engine that hosts them, and the one door through which requests enter."""
