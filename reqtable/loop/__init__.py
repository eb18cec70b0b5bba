"""One pass of the loop, and one step of a request. Nothing here knows of servers, listeners or protocols."""
