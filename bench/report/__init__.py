"""Draws results: a web page, a terminal, a Markdown comment. Works from a results dictionary alone.

``bench/report/results.py`` reads and validates the dictionary, ``units.py`` writes every number the
same way everywhere, ``draw.py`` turns figures into SVG. Nothing here measures, and importing this
package needs only the standard library: matplotlib, jinja2 and rich are imported where they are used.
"""

from __future__ import annotations

from bench.report.draw import Comparison, ComparisonRow, Drawing, draw, table
from bench.report.markdown import to_markdown
from bench.report.page import render_page, write_page
from bench.report.results import read
from bench.report.terminal import print_lab
from bench.report.units import format_interval, format_ratio, format_seconds, format_value

__all__ = [
    "Comparison",
    "ComparisonRow",
    "Drawing",
    "draw",
    "format_interval",
    "format_ratio",
    "format_seconds",
    "format_value",
    "print_lab",
    "read",
    "render_page",
    "table",
    "to_markdown",
    "write_page",
]
