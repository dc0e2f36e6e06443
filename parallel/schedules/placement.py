"""Where the stages lie: which rank holds which part of the model."""


def looped(world_size: int, stages_per_rank: int = 1) -> tuple[int, ...]:
    """Round the ranks, ``stages_per_rank`` times: the last rank hands on to the first (Narayanan et al. 2021,
    "Efficient Large-Scale Language Model Training on GPU Clusters", section 2.2)."""
    return tuple(range(world_size)) * stages_per_rank


def v_shaped(world_size: int) -> tuple[int, ...]:
    """Down the ranks and up again: rank 0 holds the first stage and the last, the last rank two in the
    middle (Qi et al. 2024, "Pipeline Parallelism with Controllable Memory", section 3)."""
    return (*range(world_size), *reversed(range(world_size)))
