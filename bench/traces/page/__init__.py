"""One self-contained HTML page for a trace or a job of ranks, and one for what differs between two.

A page opens offline, asks nothing of the network and allows itself nothing but its own script (whose hash
stands in its content security policy). Everything is there as text too: the drawings add to the tables.

``timeline.py`` and ``flame.py`` choose what is drawn, ``packing.py`` makes it small, the ``.js`` files draw
it, ``trace_page.py`` and ``difference_page.py`` say what stands where.
"""

from __future__ import annotations

from bench.traces.page.difference_page import render_difference_page, write_difference_page
from bench.traces.page.trace_page import render_trace_page, write_trace_page

__all__ = ["render_difference_page", "render_trace_page", "write_difference_page", "write_trace_page"]
