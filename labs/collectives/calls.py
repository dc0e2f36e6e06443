"""One collective on one rank: torch.distributed's over gloo or shm, or ours, under the same names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from labs.collectives.inputs import whole
from labs.lab import Recorder

OURS = "ours"
ROOT = 0
MOST_SHOWN = 2**19  # elements of all ranks' results together


def algorithm_of(way: str) -> str | None:
    """ "ring" of ``ours_ring``; None where the size decides."""
    return way.removeprefix(f"{OURS}_") if way.startswith(f"{OURS}_") else None


def group_of(way: str) -> Any:
    """A process group for the way; None is the world's own, gloo."""
    import torch.distributed as dist

    if way != "shm":
        return None
    import parallel.shm  # noqa: F401 (registers the backend)

    return dist.new_group(backend="shm")


def call(operation: str, way: str, elements: int, group: Any) -> Callable[[], Any]:
    """A function that runs the collective once and returns this rank's result, None where it has none.

    What works in place is refilled before each call, since a sum of sums would grow without bound.
    """
    import torch
    import torch.distributed as dist

    from parallel import collectives

    ours = way.startswith(OURS)
    api: Any = collectives if ours else dist
    more: dict[str, Any] = {"group": group}
    if ours:
        more["checked"] = False
        if algorithm_of(way):
            more["algorithm"] = algorithm_of(way)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = whole(rank, elements)
    held, part = mine.clone(), mine[: elements // ranks].clone()
    is_root = rank == ROOT
    parts = list(held.chunk(ranks)) if is_root else None

    def broadcast() -> Any:
        api.broadcast(held, ROOT, **more)
        return held

    def reduce() -> Any:
        held.copy_(mine)
        api.reduce(held, ROOT, **more)
        return held if is_root else None

    def all_reduce() -> Any:
        held.copy_(mine)
        api.all_reduce(held, **more)
        return held

    def gather() -> Any:
        api.gather(part, parts, ROOT, **more)
        return held if is_root else None

    def scatter() -> Any:
        api.scatter(part, parts, ROOT, **more)
        return part

    def all_gather() -> Any:
        api.all_gather_into_tensor(held, part, **more)
        return held

    def reduce_scatter() -> Any:
        api.reduce_scatter_tensor(part, mine, **more)
        return part

    def all_to_all() -> Any:
        api.all_to_all_single(held, mine, **more)
        return held

    functions = (broadcast, reduce, all_reduce, gather, scatter, all_gather, reduce_scatter, all_to_all)
    run: dict[str, Callable[[], Any]] = {function.__name__: function for function in functions}
    return torch.no_grad()(run[operation])


def material(result: Any, ranks: int) -> Any:
    """What is shown of one of ``ranks`` results: all of it, or, of large ones, which together would not pass
    the store between ranks and runner (8 MiB), every so many elements and then the sums of all blocks.

    In float64, where sums of the inputs' integers are exact: one wrong element shows in its block's sum.
    """
    import torch

    flat, most = result.detach().reshape(-1).double(), MOST_SHOWN // ranks
    if flat.numel() <= most:
        return result.detach().double()
    stride = -(-2 * flat.numel() // most) | 1
    sums = [block.sum() for block in flat.chunk(min(1024, most // 2))]
    return torch.cat([flat[::stride], torch.stack(sums)])


class Shown:
    """A step whose first call, which is never timed, returns what every rank got: proof of all ranks."""

    def __init__(self, run: Callable[[], Any], group: Any = None) -> None:
        self._run, self._group, self._first = run, group, True

    def __call__(self) -> Any:
        result = self._run()
        if not self._first:
            return result
        import torch.distributed as dist

        self._first = False
        found: list[Any] = [None] * dist.get_world_size()
        shown = None if result is None else material(result, len(found)).numpy()
        dist.all_gather_object(found, shown)
        return found

    def close(self) -> None:
        if self._group is not None:
            import torch.distributed as dist

            dist.destroy_process_group(self._group)


def count_sent(operation: str, way: str, elements: int, recorder: Recorder) -> None:
    """Record what all ranks send in one call of ours, counted in the backend."""
    import torch
    import torch.distributed as dist

    from parallel import link

    group = dist.new_group(backend="link")
    run = call(operation, way, elements, group)
    with link.counted() as traffic:
        run()
    total = torch.tensor([float(traffic.sent)], dtype=torch.float64)
    dist.all_reduce(total)
    recorder.record("sent", float(total), "B")
    dist.destroy_process_group(group)
