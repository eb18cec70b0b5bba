"""One pass of the loop, and one step of a request. Nothing here knows a server, a listener or a protocol."""
