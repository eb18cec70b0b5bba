"""Runs servers as a program: addresses, signals, workers, the command line."""
