"""One service on several machines: a Dask cluster for the heavy step, and HAProxy in front of two servers.

`python -m examples.cluster` starts all of it on this machine. docs/how-to/outgrow-one-machine.md explains it.
"""
