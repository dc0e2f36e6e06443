"""Sizes of the collectives lab."""

from __future__ import annotations

from dataclasses import dataclass

from labs.lab import setting

FLOAT = 4  # bytes
SMALL_KIB = (4, 16, 64, 256)  # all-reduces that alpha and beta are fitted on


@dataclass(frozen=True)
class Config:
    ranks: int = setting(2, unit="processes", help="ranks of the world", minimum=2, maximum=64)
    more_ranks: int = setting(
        4, quick=0, unit="processes", help="ranks of a second world; 0: only predicted", minimum=0, maximum=64
    )
    size_KiB: int = setting(
        1024,
        quick=512,
        full=4096,
        unit="KiB",
        help="vector of each collective",
        minimum=1,
        maximum=2**20,
    )
    large_KiB: int = setting(
        8192,
        quick=4096,
        full=65536,
        unit="KiB",
        help="all-reduce that the small ones predict",
        minimum=512,
        maximum=2**20,
    )
    layers: int = setting(8, unit="layers", help="layers of a step", minimum=2, maximum=1024)
    width: int = setting(
        512, unit="numbers", help="rows and columns of a layer's product", minimum=32, maximum=2**14
    )
    compute_ms: float = setting(
        4.0, full=10.0, unit="ms", help="a virtual layer's compute", minimum=0.1, maximum=1e4
    )
    link_ms: float = setting(
        4.0,
        full=10.0,
        unit="ms",
        help="what the slow link takes for a layer's all-reduce",
        minimum=0.1,
        maximum=1e4,
    )

    def __post_init__(self) -> None:
        if self.more_ranks == 1 or self.more_ranks == self.ranks:
            raise ValueError(
                f"collectives: more_ranks={self.more_ranks} is no other world than ranks={self.ranks}; "
                "0 measures none"
            )

    def elements(self, ranks: int, kib: int) -> int:
        """float32 in a whole vector of about ``kib`` KiB that divides by the ranks."""
        return -(-kib * 1024 // (FLOAT * ranks)) * ranks

    @property
    def sweep_KiB(self) -> tuple[int, ...]:
        return *SMALL_KIB, self.large_KiB

    @property
    def bucket_rows(self) -> int:
        """Rows of a layer's product that are all-reduced: small, so that the link's delay decides."""
        return min(32, self.width)
