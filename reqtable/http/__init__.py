"""HTTP/1.1 on the table: handlers to derive from, files, WSGI applications, WebSockets."""
