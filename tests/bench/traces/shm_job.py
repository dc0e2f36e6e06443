"""A job over shared memory in which every operation is recorded: what test_ranks_shm.py looks at."""

import time

STEPS, ELEMENTS = 4, 1000
LONG = 1 << 19  # elements; two such reductions are under way at once


def communicate(folder):
    """Operations of all kinds, called and waited for in both ways, in the world and in a group of its own."""
    import torch
    import torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile

    rank, size = dist.get_rank(), dist.get_world_size()
    pair = dist.new_group([0, 1])
    mine, whole = torch.ones(ELEMENTS), torch.ones(size * ELEMENTS)
    parts = list(whole.split(ELEMENTS))
    first, second = torch.ones(LONG), torch.ones(LONG // 2)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        for _ in range(STEPS):
            dist.all_reduce(mine)
            works = [dist.all_reduce(tensor, async_op=True) for tensor in (first, second)]
            torch.mm(torch.ones(64, 64), torch.ones(64, 64))
            for work in works:
                work.wait()
            dist.all_gather(parts, mine)
            dist.reduce_scatter(mine, parts)
            dist.broadcast(mine, 0)
            dist.all_to_all_single(torch.empty_like(whole), whole)
            if rank < 2:
                dist.all_reduce(mine, group=pair)
                (dist.send if rank == 0 else dist.recv)(mine, 1 - rank)
            dist.barrier()
    recorded.export_chrome_trace(f"{folder}/rank{rank}.json")


def late(folder, slow):
    """Steps in which something is computed beside a reduction; one rank sleeps in each."""
    import torch
    import torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile, record_function

    rank, gradient, matrix = dist.get_rank(), torch.ones(LONG), torch.ones(128, 128)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        for step in range(20):
            with record_function(f"ProfilerStep#{step}"):
                with record_function("load batch"):
                    if rank == slow:
                        time.sleep(8e-3)
                work = dist.all_reduce(gradient, async_op=True)
                for _ in range(60):
                    torch.mm(matrix, matrix)
                work.wait()
    recorded.export_chrome_trace(f"{folder}/rank{rank}.json")
