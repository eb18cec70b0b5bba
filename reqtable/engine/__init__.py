"""The loop and the sockets. It knows the core, and nothing of handlers, policies or servers beyond their protocols."""
