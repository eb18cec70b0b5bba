"""Forked children: what forks them, what they do first, and how the parent learns that they have exited."""
