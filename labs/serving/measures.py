"""What is measured of served requests: times to tokens, goodput, and whether the books balance.

TTFT is arrival to first token, with its time in the queue; ITL each gap between tokens, not their mean over a
request (TPOT), which hides stalls. How many meet both limits depends on how many come: the highest rate at
which 90 % do is goodput (Zhong et al. 2024, section 2), which ``extrapolation`` searches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Served:
    """A request's times, in seconds on one clock. due: when it was to arrive. submitted: when it did."""

    number: int
    due: float
    submitted: float = math.nan
    tokens: list[int] = field(default_factory=list)
    at: list[float] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        return self.at[0] - self.due

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.at, self.at[1:], strict=False)]

    @property
    def stay(self) -> float:
        """Seconds in the house."""
        return self.at[-1] - self.submitted


@dataclass(frozen=True)
class Limits:
    """What a request is promised (SLO): seconds to its first token, and the longest of its gaps that 99 of
    100 stay below (``itl``)."""

    ttft: float
    itl: float

    def __post_init__(self) -> None:
        for name in ("ttft", "itl"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(
                    f"a limit of {name}={getattr(self, name)} s cannot be met; it must be above 0"
                )

    def met(self, served: Served) -> bool:
        return served.ttft <= self.ttft and (not served.gaps or quantile(served.gaps, 0.99) <= self.itl)


@dataclass(frozen=True)
class Measures:
    """Of all requests together: times in seconds, met in requests/s that met both limits, throughput in
    tokens/s."""

    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    itl_max: float
    met: float
    attained: float  # share of requests that met the limits
    throughput: float


def measure(served: Sequence[Served], limits: Limits) -> Measures:
    """ValueError where nothing was served."""
    if not served:
        raise ValueError("nothing was served")
    gaps = [gap for each in served for gap in each.gaps] or [0.0]
    first = [each.ttft for each in served]
    span = max(each.at[-1] for each in served) - min(each.due for each in served)
    met = sum(limits.met(each) for each in served)
    return Measures(
        quantile(first, 0.5),
        quantile(first, 0.99),
        quantile(gaps, 0.5),
        quantile(gaps, 0.99),
        max(gaps),
        met / span,
        met / len(served),
        sum(len(each.at) for each in served) / span,
    )


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


def little(served: Sequence[Served], counted: float, span: float) -> float:
    """Little's law (1961): requests in the house on average = rate x stay. How far it is off, as a share.

    served: rate and stay, as who asks sees them. counted: integral over time of the number in the house, as
    workers report it (requests x s, ``Seen.in_house``).
    """
    expected = sum(each.stay for each in served)
    return abs(counted - expected) / max(expected, 1e-12) if span > 0 else math.inf
