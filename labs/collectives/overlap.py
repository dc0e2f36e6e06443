"""The same layers with their collective waited for at once, and asynchronously, over a slow link.

Compute is real (``matmul``: a product on this rank's core) or virtual (``virtual``: the rank sleeps, as it
would while an accelerator computes). The link sleeps too (parallel/link.py), so that communication takes no
core away: on two cores gloo alone would only move work from one thread to the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from labs.collectives.calls import Shown
from labs.collectives.config import FLOAT, Config
from labs.collectives.inputs import factors
from labs.lab import Recorder, Step

KINDS = ("virtual", "matmul")
NAMES = ("compute", "communication", "waited", "asynchronous")


def link_constants(config: Config) -> tuple[float, float]:
    """(latency, seconds per byte) of a link on which a ring's all-reduce of a layer's bucket takes
    ``link_ms``, half for its messages and half for its bytes."""
    messages, total = 2 * (config.ranks - 1), config.link_ms / 1e3
    moved = messages / config.ranks * FLOAT * config.bucket_rows * config.width
    return total / 2 / messages, total / 2 / moved


def setup_of(kind: str, name: str) -> Callable[[Any, Recorder], Step]:
    def setup(config: Config, recorder: Recorder) -> Step:
        import torch
        import torch.distributed as dist

        from parallel import link

        group = dist.new_group(backend=link.wrap("gloo", *link_constants(config)))
        activations, weights = factors(dist.get_rank(), config.width)
        product = activations @ weights
        buckets = torch.empty(config.layers, config.bucket_rows, config.width)
        computes, communicates = name != "communication", name != "compute"

        def compute(layer: int) -> None:
            begin = recorder.now()
            if computes and kind == "virtual":
                time.sleep(config.compute_ms / 1e3)
            elif computes:
                torch.mm(activations, weights, out=product)
            torch.mul(product[: config.bucket_rows], layer + 1, out=buckets[layer])
            recorder.record("compute_begin", begin, "s")
            recorder.record("compute_end", recorder.now(), "s")

        def start(layer: int) -> Any:
            """The all-reduce of the layer's bucket; its future is the time at which it was through."""
            recorder.record("communication_begin", recorder.now(), "s")
            work = dist.all_reduce(buckets[layer], group=group, async_op=True)

            def through(future: Any) -> float:
                future.value()  # raises what went wrong
                return recorder.now()

            return work.get_future().then(through)

        def finish(pending: Any) -> None:
            recorder.record("communication_end", pending.wait(), "s")

        def run() -> Any:
            pending = []
            for layer in range(config.layers):
                compute(layer)
                if communicates:
                    pending.append(start(layer))
                    if name != "asynchronous":
                        finish(pending.pop())
            for each in pending:
                finish(each)
            return buckets

        return Shown(run, group)

    return setup


def expected(config: Config, name: str) -> list[Any]:
    """What each rank's buckets hold after a step, by a plain computation."""
    import torch

    rows = []
    for rank in range(config.ranks):
        activations, weights = factors(rank, config.width)
        rows.append(activations[: config.bucket_rows] @ weights)
    scale = torch.arange(1.0, config.layers + 1).view(-1, 1, 1)
    if name == "compute":
        return [row * scale for row in rows]
    return [sum(rows) * scale] * config.ranks
