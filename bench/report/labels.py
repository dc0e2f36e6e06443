"""Puts words beside points so that none covers another: greedy, over a few places around each point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Where a label may stand: direction (x, y) from the point, tried near to far, right-hand side first.
_DIRECTIONS = ((1, 0.6), (1, -0.6), (-1, 0.6), (-1, -0.6), (0, 1), (0, -1), (1, 0), (-1, 0))
_DISTANCES = (5.0, 14.0, 26.0)


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: Box) -> bool:
        return (
            self.left < other.right
            and other.left < self.right
            and self.bottom < other.top
            and other.bottom < self.top
        )

    def inside(self, other: Box) -> bool:
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.bottom >= other.bottom
            and self.top <= other.top
        )


@dataclass(frozen=True)
class Place:
    """Where a label stands: its box and how far that is from its point (above 10: draw a line to it)."""

    box: Box
    distance: float
    clear: bool


def text_width(text: str, size: float) -> float:
    """Pixels a text takes, about: a letter of a wide sans serif font is 0.63 of its size wide."""
    return 0.63 * size * len(text)


def place(
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    size: float,
    area: Box,
    obstacles: Sequence[Box],
    lines: Sequence[Box],
) -> list[Place]:
    """A place for each text beside its point (pixels), at ``size`` pixels height.

    Never over ``obstacles`` (markers) or another label if that can be avoided; over ``lines`` only
    when there is no better place. ``Place.clear`` is False where a label had to cover something.
    """
    taken = list(obstacles)
    places: dict[int, Place] = {}
    # Points from the top down: neighbours are handled one after the other.
    for index in sorted(range(len(points)), key=lambda i: (-points[i][1], points[i][0])):
        x, y = points[index]
        width, height = text_width(texts[index], size), size * 1.15
        candidates = []
        for distance in _DISTANCES:
            for rank, (right, up) in enumerate(_DIRECTIONS):
                box = _box(x, y, right * distance, up * distance, right, up, width, height)
                hard = sum(box.overlaps(other) for other in taken) + 3 * (not box.inside(area))
                soft = any(box.overlaps(other) for other in lines)
                cost = 100.0 * hard + 12.0 * soft + 0.5 * distance + 0.1 * rank
                candidates.append((cost, Place(box, distance, hard == 0)))
        places[index] = min(candidates, key=lambda candidate: candidate[0])[1]
        taken.append(places[index].box)
    return [places[index] for index in range(len(points))]


def _box(
    x: float, y: float, dx: float, dy: float, right: float, up: float, width: float, height: float
) -> Box:
    left = x + dx - (0 if right > 0 else width if right < 0 else width / 2)
    bottom = y + dy - (height / 2 if abs(up) < 0.9 else 0 if up > 0 else height)
    return Box(left, bottom, left + width, bottom + height)
