"""Numbers as they stand in the sentences of a prediction."""

from __future__ import annotations


def us(seconds: float) -> str:
    """Seconds in microseconds, three digits: ``12.3 us``."""
    return f"{seconds * 1e6:.3g} us"


def duration(seconds: float) -> str:
    """Seconds in the largest unit that they fill, three digits: ``12.3 ms``."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
