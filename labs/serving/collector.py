"""Python's garbage collector, kept from stopping who serves."""

from __future__ import annotations

import gc


def settle() -> None:
    """What is there now stays: modules, the model, and what else was built to begin with. The collector does
    not look at it again. Each look at half a million objects stops all requests for as long as some fifty
    tokens take."""
    gc.collect()
    gc.freeze()
