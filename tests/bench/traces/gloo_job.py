"""A job of real ranks over gloo, each recording itself: what test_ranks_gloo.py looks at."""

import time

STEPS = 20
WAYS = ("sleep in a range", "sleep", "heavier computation")


def train(folder, slow, way):
    """Some steps of nothing in particular under torch.profiler; the rank ``slow`` does more in each."""
    import torch
    import torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile, record_function

    rank = dist.get_rank()
    left, right, gradient = torch.ones(128, 128), torch.ones(128, 128), torch.ones(1000)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        for step in range(STEPS):
            with record_function(f"ProfilerStep#{step}"):
                with record_function("load batch"):
                    if rank == slow and way == "sleep in a range":
                        time.sleep(8e-3)
                for _ in range(60):
                    torch.mm(left, right)
                if rank == slow and way == "sleep":
                    time.sleep(8e-3)
                if rank == slow and way == "heavier computation":
                    for _ in range(120):
                        torch.mm(left, right)
                torch.relu(left)
                dist.all_reduce(gradient)
    recorded.export_chrome_trace(f"{folder}/rank{rank}.json")
