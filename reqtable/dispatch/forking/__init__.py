"""Forked children: what forks one, what a child does first, and how the parent learns of its end."""
