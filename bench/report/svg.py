"""A matplotlib figure as an SVG element that may stand inside a page, many times over.

matplotlib's own file is a document: a DOCTYPE, metadata, a style that applies to every element of the
page it is put into, ids that repeat from figure to figure, and fixed colours. What comes out of here
has none of these: ids carry the drawing's name, colours are CSS variables with the light colour as
fallback, text is text in the page's own font.
"""

from __future__ import annotations

import io
import re
from typing import Any
from xml.etree import ElementTree

# Each colour is drawn in its light form and becomes a variable, which a dark page sets otherwise.
INK = "#1b2430"
SOFT = "#5a6676"
GRID = "#dde2e9"
PAPER = "#fdfefe"
ALARM = "#b3261e"
# Blue, vermillion, green, purple, gold, sky, grey: told apart with every common colour blindness
# (after Okabe and Ito, "Color Universal Design", 2008; a little darker, for contrast on white).
SERIES = ("#0b66a8", "#cf5508", "#07866a", "#b0578f", "#a97f00", "#3a9bd2", "#6d6d73")
VARIABLES = {
    INK: "--ink",
    SOFT: "--soft",
    GRID: "--grid",
    PAPER: "--paper",
    ALARM: "--alarm",
    **{colour: f"--c{index}" for index, colour in enumerate(SERIES)},
}

RC = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and it is smaller
    "text.parse_math": False,  # a "$" in a label is a dollar, not an unfinished formula
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": SOFT,
    "axes.linewidth": 0.8,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.labelcolor": INK,
}

_KEPT = {
    "svg",
    "g",
    "defs",
    "clipPath",
    "path",
    "rect",
    "use",
    "text",
    "tspan",
    "line",
    "polyline",
    "polygon",
}
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_COLOUR = re.compile(r"#[0-9a-f]{6}\b")
_NUMBER = re.compile(r"-?\d+\.\d{2,}")
# "font: bold 12px 'DejaVu Sans', ..." of matplotlib 3.10, "font-family: ..." of 3.11.
_FONT = re.compile(r"\bfont: ?([^;']*?)([\d.]+px)[^;]*")
_FAMILY = re.compile(r"font-family: ?[^;]*;? ?")


def to_svg(figure: Any, name: str, title: str) -> str:
    """The figure as one ``<svg>`` element whose ids start with ``name``; read aloud as ``title``."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    settle(figure)
    buffer = io.BytesIO()
    # savefig would draw everything twice, to find a layout that is settled already.
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    _keep_drawing_only(root)
    _rename_ids(root, name)
    for element in root.iter():
        _restyle(element)
    size = root.get("viewBox", "0 0 1 1").split()
    root.attrib = {
        "xmlns": "http://www.w3.org/2000/svg",
        "viewBox": root.get("viewBox", ""),
        "width": size[2],
        "height": size[3],
        "role": "img",
        "aria-label": title,
        "style": "stroke-linejoin:round",
    }
    return ElementTree.tostring(root, encoding="unicode")


def settle(figure: Any) -> None:
    """Makes room for labels and legend once and for all: from now on pixels are known."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")


def _local(name: str) -> str:
    return name.rsplit("}", 1)[-1]


def _keep_drawing_only(root: ElementTree.Element) -> None:
    """Drops metadata and style sheets, and the namespaces, which HTML does not know."""
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(str(child.tag)) not in _KEPT:
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(str(element.tag))
        element.attrib = {_local(key): value for key, value in element.attrib.items()}
        if element.tag not in ("text", "tspan"):
            element.text = None
        element.tail = None


def _rename_ids(root: ElementTree.Element, name: str) -> None:
    """Ids become ``name-1``, ``name-2`` ...; those that nothing refers to go."""
    wanted: dict[str, str] = {}
    for element in root.iter():
        for value in element.attrib.values():
            for found in _REFERENCE.findall(value):
                wanted.setdefault(found, f"{name}-{len(wanted) + 1}")
        href = element.get("href", "")
        if href.startswith("#"):
            wanted.setdefault(href[1:], f"{name}-{len(wanted) + 1}")
    for element in root.iter():
        identity = element.attrib.pop("id", None)
        if identity in wanted:
            element.set("id", wanted[identity])
        if element.get("href", "").startswith("#"):
            element.set("href", "#" + wanted[element.get("href", "")[1:]])
        for key, value in element.attrib.items():
            if "url(#" in value:
                element.set(key, _REFERENCE.sub(lambda found: f"url(#{wanted[found[1]]})", value))


def _restyle(element: ElementTree.Element) -> None:
    """Colours to variables, the page's font, two decimals (a hundredth of a pixel)."""
    for key, value in list(element.attrib.items()):
        if key in ("d", "x", "y", "points", "transform", "width", "height"):
            value = _NUMBER.sub(lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), value)
            element.set(key, " ".join(value.split()))
    if element.get("transform", "").startswith("rotate(-0 "):
        del element.attrib["transform"]
    style = element.get("style")
    if not style:
        return
    style = _FAMILY.sub("", style)
    style = _FONT.sub(lambda found: _font(found[1], found[2]), style)
    style = _COLOUR.sub(_variable, style)
    if element.tag == "text" and "fill" not in style:
        style += f"; fill: {_variable(re.match('.*', INK))}"
    element.set("style", style.strip("; "))


def _font(words: str, size: str) -> str:
    weight = next((word for word in words.split() if word in ("bold", "600", "700")), "")
    return f"font-size: {size}" + (f"; font-weight: {weight}" if weight else "")


def _variable(found: re.Match[str] | None) -> str:
    colour = found[0] if found else INK
    return f"var({VARIABLES[colour]}, {colour})" if colour in VARIABLES else colour
