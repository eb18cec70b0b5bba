"""Draws graphs as SVG that stands in a page, in colours that fit a light and a dark page."""

from __future__ import annotations

import re

import pygraphviz  # of the extra `docs`


def drawn(dot: str, label: str) -> str:
    """Return a graph in the language of Graphviz as a figure. `label` says to a screen reader what it shows."""
    svg = pygraphviz.AGraph(dot).draw(format="svg", prog="dot").decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<polygon fill="white".*?/>', "", svg, count=1, flags=re.DOTALL)  # the background
    svg = re.sub(r'(fill|stroke)="black"', r'\1="currentColor"', svg)
    svg = re.sub(r"<!--.*?-->|<title>.*?</title>|\n", "", svg, flags=re.DOTALL)
    svg = svg.replace("<text ", '<text fill="currentColor" ')
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" class="graph" ', 1)
    return f'<figure class="graph">{svg}</figure>'
