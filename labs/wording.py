"""Numbers as they stand in the sentences of a prediction."""

from __future__ import annotations


def us(seconds: float) -> str:
    """Seconds in microseconds, three digits: ``12.3 us``."""
    return f"{seconds * 1e6:.3g} us"
