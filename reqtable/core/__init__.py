"""The pure core: states, the table, wants, buffers, deadlines, errors.

Nothing in this package imports `socket`, `selectors`, `time` or `threading`: it takes bytes and `now`, and says what
follows from them. A test reads the imports and fails on any that break this.
"""
