"""The frame of a page: style, script, content security policy, the block of data that the script draws."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from bench.report.page import environment
from bench.traces.page.packing import data_block

_FOLDER = Path(__file__).parent
_SCRIPTS = (
    "unpack.js",
    "canvas.js",
    "timeline_model.js",
    "timeline_draw.js",
    "timeline_input.js",
    "timeline_text.js",
    "flame.js",
    "main.js",
)


@cache
def script() -> str:
    """All scripts of a page as one, with names of their own."""
    parts = [(_FOLDER / name).read_text(encoding="utf-8") for name in _SCRIPTS]
    return "(() => {\n'use strict';\n" + "\n".join(parts) + "})();\n"


def render(template: str, data: Mapping[str, Any], **values: Any) -> str:
    """The page. data: what the script draws, plain JSON; values: what the template shows."""
    from markupsafe import Markup

    text = script()
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
    return (
        environment(_FOLDER)
        .get_template(template)
        .render(
            # Safe: our own files, and JSON in which no letter can end the element.
            script=Markup(text),
            script_hash=f"sha256-{digest}",
            data=Markup(data_block(data)),
            **values,
        )
    )
