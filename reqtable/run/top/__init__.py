"""`reqtable top`: a live screen of the requests of running servers.

`figures` makes rates of counts. `model` is what the screen shows, and `controls` is what its keys do. `view` draws the
model, `keys` reads the keyboard, and `screen` joins them. `reqtable.run.commands.servers` asks the servers.
"""
