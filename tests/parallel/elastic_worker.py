"""A training script as a user would write it: joins, resumes, trains, saves. Run by torchrun in
test_elastic.py.

elastic_worker.py FOLDER STEPS EVERY FORM: writes its losses, a line a step, into FOLDER/losses-<rank>. FORM:
"gloo", whole models whose gradients are averaged, or "shm", sharded by fully_shard.
"""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import parallel.shm  # noqa: F401 (registers the backend "shm")
from parallel import checkpoint, elastic
from parallel.fsdp import fully_shard


def train(folder, steps, every, form, world, attempt):
    with open(folder / f"losses-{world.rank}", "a", 1) as losses:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 16))
        if form == "shm":
            fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        torch.manual_seed(world.rank)  # of dropout
        generators = checkpoint.PerRank(checkpoint.RandomGenerators())
        state = {"model": model, "optimizer": optimizer, "generators": generators, "position": 0}
        saved = folder / "checkpoints"
        step = checkpoint.load(saved, state) if checkpoint.latest(saved) else 0
        while step < steps:
            step += 1
            batch = torch.Generator().manual_seed(state["position"] * world.world_size + world.rank)
            state["position"] += 1
            x = torch.randn(8, 16, generator=batch)
            optimizer.zero_grad()
            loss = (model(x) - x).square().mean()
            loss.backward()
            if form == "gloo":
                for parameter in model.parameters():
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= world.world_size
            optimizer.step()
            if step % every == 0:
                checkpoint.save(saved, step, state)
            losses.write(f"{attempt} {step} {loss.item()!r} {os.getpid()}\n")
            time.sleep(0.01)


if __name__ == "__main__":
    folder, steps, every, form = sys.argv[1:]
    with elastic.join(form, timeout=60) as world:
        train(Path(folder), int(steps), int(every), form, world, os.environ["TORCHELASTIC_RESTART_COUNT"])
