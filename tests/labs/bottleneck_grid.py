"""The grid on which the diagnosis is judged: fault x seed x size, each a real job, recorded.

``python tests/labs/bottleneck_grid.py FILE [PIECE ...]`` records what FILE lacks and writes the facts, a line
a job: ``{"planted": ..., "size": ..., "seed": ..., "facts": {...}}``. A piece is small/3 (a size and a seed)
or small/3/input; without any it is the whole grid. A seed also draws how strong the faults are.
"""

import json
import os
import random
import sys
import tempfile
from pathlib import Path

SIZES = {"small": (192, 2, 16, 48), "middle": (256, 2, 16, 64), "large": (384, 3, 16, 64)}
PIECES = (("small", 3), ("middle", 3), ("large", 3), ("small", 4), ("middle", 4))
"""Size and seed, each with every fault. Held out: thresholds were chosen on jobs of seeds 0 to 2."""


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
        "read_ms": draw.uniform(4.0, 12.0),
        "python_passes": draw.choice((3, 4, 6)),
        "pieces": draw.choice((16, 32)),
        "threads": draw.choice((4, 8, 16)),
        "spare": draw.uniform(1.05, 1.3),
        "uneven": draw.choice((4, 7, 15)),  # of 16 sequences 13, 14 or 15
    }


def recorded(address, config, worlds):
    """The facts of one real job under the profiler."""
    from bench.diagnosis.facts import facts_of
    from bench.measure import RoundRecorder
    from bench.profile.steps import record
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


def planted():
    """The name that is right -> the address of its job, of all that run on this machine."""
    from labs.bottlenecks.ways import PAIRS, RANKED

    faults = {group: f"{group}/fault" for group, pair in (PAIRS | RANKED).items() if not pair.missing()}
    return {"none": "none/healthy"} | faults


def jobs():
    """(the name that is right, size, seed) of every job, in the order they are recorded in."""
    return [(cause, size, seed) for size, seed in PIECES for cause in planted()]


def grid(wanted):
    """A dictionary for each job."""
    import torch

    from bench.world.steps import Worlds
    from labs.bottlenecks.config import Config

    torch.set_num_threads(1)
    worlds = Worlds()
    try:
        for cause, size, seed in wanted:
            facts = recorded(planted()[cause], Config(**settings(size, seed)), worlds)
            yield {"planted": cause, "size": size, "seed": seed, "facts": facts.to_json()}
    finally:
        worlds.close()


def key(row):
    return row["planted"], row["size"], row["seed"]


def read(path):
    """The rows of a file; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(path, *pieces):
    from bench.diagnosis.facts import Facts
    from bench.diagnosis.verdict import decide

    path = Path(path)
    rows = {key(row): row for row in read(path)}
    wanted = [
        job
        for job in jobs()
        if job not in rows
        and (not pieces or {f"{job[1]}/{job[2]}", f"{job[1]}/{job[2]}/{job[0]}"} & {*pieces})
    ]
    for row in grid(wanted):
        empty = (0, [], {}, None)
        row["facts"] = {
            name: value
            for name, value in row["facts"].items()
            if value not in empty and name not in ("places", "lacks")
        }
        rows[key(row)] = row
        path.write_text("".join(json.dumps(rows[job]) + "\n" for job in jobs() if job in rows))
        said = decide(Facts.from_json(row["facts"]))
        ranked = [(one.cause, round(one.share, 2)) for one in said.ranked[:3]]
        print(*key(row), "->", said.bottleneck, ranked, flush=True)


if __name__ == "__main__":
    from bench.environment import allocator_environment, allocator_mode

    if allocator_mode() != "tuned":  # as the lab's column: the mode is fixed when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | allocator_environment("tuned"))
    main(*sys.argv[1:])
