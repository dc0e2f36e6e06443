"""What the service counts and, while it is watched, what it sees of every step and message."""

from __future__ import annotations

from dataclasses import dataclass, field

from labs.serving.worker import Report


@dataclass(frozen=True)
class Trip:
    """A request (size 0) or what is handed over (bytes) on its way to a worker: when it was sent, when it
    came, and in which of the reports it was new."""

    size: int
    sent: float
    came: float
    report: int


@dataclass
class Counters:
    """Since the start."""

    accepted: int = 0
    finished: int = 0
    refused: int = 0
    aborted: int = 0
    failed: int = 0
    retried: int = 0
    lost_workers: int = 0
    tokens: int = 0
    hand_overs: int = 0
    handed_bytes: int = 0


@dataclass
class Seen:
    """For the cost model. packs: (bytes, seconds of the sender's own time to take out and pack); trips: to
    workers; reports: (worker, step), and delivers: seconds until each was here."""

    packs: list[tuple[int, float]] = field(default_factory=list)
    trips: list[Trip] = field(default_factory=list)
    delivers: list[float] = field(default_factory=list)
    reports: list[tuple[int, Report]] = field(default_factory=list)

    @property
    def in_house(self) -> float:
        """Requests x seconds: on workers, as these say, and on the way to them and back."""
        found = sum(trip.came - trip.sent for trip in self.trips)
        for (_, report), deliver in zip(self.reports, self.delivers, strict=True):
            found += sum(report.stayed) + len(report.stayed) * (report.free - report.ended + deliver)
        return found
