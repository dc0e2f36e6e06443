"""The grid on which the diagnosis is judged: fault x seed x size, each a real job, recorded.

``python tests/labs/bottleneck_grid.py FILE [SEED ...]`` records it anew and writes the facts, a line a job:
``{"planted": ..., "size": ..., "seed": ..., "facts": {...}}``. A seed also draws how strong the faults are.
"""

import json
import random
import sys
import tempfile
from pathlib import Path

SIZES = {"small": (192, 2, 8, 96), "middle": (256, 2, 8, 128), "large": (384, 3, 8, 128)}
SEEDS = (3, 4, 5)
"""Held out: thresholds were chosen on jobs of seeds 0 to 2."""


def settings(size, seed):
    """Of the lab at this size, with faults as strong as the seed draws."""
    width, layers, sequences, length = SIZES[size]
    draw = random.Random(f"{size} {seed}")
    return {
        "width": width,
        "layers": layers,
        "sequences": sequences,
        "length": length,
        "seed": seed,
        "read_ms": draw.uniform(8.0, 24.0),
        "python_passes": draw.choice((3, 4, 6)),
        "pieces": draw.choice((16, 32)),
        "threads": draw.choice((4, 8, 16)),
        "spare": draw.uniform(1.05, 1.3),
        "uneven": draw.choice((4, 5, 7)),
        "profiled": 4,
    }


def recorded(address, config, worlds):
    """The facts of one real job under the profiler."""
    from bench.diagnose import facts_of
    from bench.measure import RoundRecorder
    from bench.profiled import record
    from bench.traces.load import load
    from labs import load as load_lab
    from labs.lab import find

    variant = find(load_lab("bottlenecks"), config, address)
    with tempfile.TemporaryDirectory() as folder:
        if variant.processes > 1:
            step = worlds.step("bottlenecks", config, variant)
        else:
            step = variant.setup(config, RoundRecorder())
        try:
            for _ in range(3):
                step()
            if variant.processes > 1:
                step.profile(config.profiled, folder)
            else:
                record(step, config.profiled, Path(folder) / "profile.json.gz")
        finally:
            step.close()
        return facts_of(load(folder))


def addresses():
    """(address, the name that is right) of every job that runs on this machine."""
    from labs.bottlenecks.ways import PAIRS, RANKED

    yield "none/healthy", "none"
    for group, pair in (PAIRS | RANKED).items():
        if not pair.missing():
            yield f"{group}/fault", group


def grid(sizes=tuple(SIZES), seeds=SEEDS):
    """A dictionary for each job."""
    import torch

    from bench.world.steps import Worlds
    from labs.bottlenecks.config import Config

    torch.set_num_threads(1)
    worlds = Worlds()
    try:
        for seed in seeds:
            for size in sizes:
                config = Config(**settings(size, seed))
                for address, planted in addresses():
                    facts = recorded(address, config, worlds)
                    yield {"planted": planted, "size": size, "seed": seed, "facts": facts.to_json()}
    finally:
        worlds.close()


def main(path, *seeds):
    from bench.diagnosis.facts import Facts
    from bench.diagnosis.verdict import decide

    with open(path, "w") as file:
        for row in grid(seeds=[int(seed) for seed in seeds] or SEEDS):
            empty = (0, [], {}, None)
            row["facts"] = {
                key: value
                for key, value in row["facts"].items()
                if value not in empty and key not in ("places", "lacks")
            }
            file.write(json.dumps(row) + "\n")
            file.flush()
            said = decide(Facts.from_json(row["facts"]))
            ranked = [(one.cause, round(one.share, 2)) for one in said.ranked[:3]]
            print(row["planted"], row["size"], row["seed"], "->", said.bottleneck, ranked, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
