"""What one run is to do, as a file: the command writes it, the measuring child reads it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from labs import load
from labs.lab import Allocator, Lab, Scale

SCALE_FACTOR = {"quick": 1.0, "normal": 3.0, "full": 10.0}


@dataclass(frozen=True)
class Plan:
    """labs: name -> settings (the Config's fields). journal: where events go."""

    labs: dict[str, dict[str, Any]]
    scale: Scale = "normal"
    device: str = ""
    journal: str = ""
    done: list[str] = field(default_factory=list)  # "lab/group/column" finished in an earlier run

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        return cls(**json.loads(Path(path).read_text()))

    def config(self, lab: Lab) -> Any:
        return lab.config(**self.labs[lab.name])

    def groups(self, column: Allocator) -> list[tuple[str, str]]:
        """(lab, group) pairs still to be measured in this column, in the labs' order."""
        wanted = []
        for name in self.labs:
            lab = load(name)
            if column not in lab.columns:
                continue
            groups = dict.fromkeys(variant.group for variant in lab.variants(self.config(lab)))
            wanted += [(name, group) for group in groups if f"{name}/{group}/{column}" not in self.done]
        return wanted

    def budget_seconds(self, lab: Lab, group: str) -> float:
        """Seconds for the timed rounds of a group: its variants' share of the lab's."""
        variants = [v for v in lab.variants(self.config(lab)) if not v.unavailable]
        repeated = [v for v in variants if v.max_rounds != 1] or variants
        mine = sum(1 for v in repeated if v.group == group)
        return lab.seconds * SCALE_FACTOR[self.scale] * mine / len(repeated) if mine else 0.0
