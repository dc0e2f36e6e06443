"""The experiments: one question a file. Importing a lab is cheap; heavy packages load when it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from labs.lab import Lab

NAMES = (
    "roofline",
    "concurrency",
    "vectorization",
    "programming_models",
    "jax_transforms",
    "bottlenecks",
    "attention",
    "precision",
    "data_parallel",
    "collectives",
    "pipeline",
    "serving",
    "tuning",
)


def load(name: str) -> Lab:
    """The lab called ``name``: one of NAMES, or any importable module (from the current folder too) that
    holds a ``LAB``, so that another repository can bring its own. ValueError when there is none."""
    import os
    import sys
    from dataclasses import replace
    from importlib import import_module
    from importlib.util import find_spec

    from labs.lab import Lab, nearest

    if name in NAMES:
        return import_module(f"labs.{name}").LAB
    unknown = ValueError(f"there is no lab {name!r}{nearest(name, NAMES)}")
    if not all(part.isidentifier() for part in name.split(".")):
        raise unknown
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: a kernels.py of that folder is not taken for ours
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise unknown
    try:
        lab = getattr(import_module(name), "LAB", None)
    except Exception as error:
        raise ValueError(f"the module {name} cannot be imported: {type(error).__name__}: {error}") from error
    if not isinstance(lab, Lab):
        raise ValueError(f"the module {name} is no lab: it has no LAB = labs.lab.Lab(...)")
    return replace(lab, name=name)
