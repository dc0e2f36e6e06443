"""What each rank holds: integers in float32, so that every order of a sum gives the same bits."""

from __future__ import annotations

from typing import Any


def whole(rank: int, elements: int) -> Any:
    """A rank's vector (elements,), float32, integers from -1000 to 1000."""
    import torch

    generator = torch.Generator().manual_seed(rank)
    return torch.randint(-1000, 1001, (elements,), generator=generator).float()


def factors(rank: int, width: int) -> tuple[Any, Any]:
    """A rank's activations and the weights of all, (width, width), float32, integers from -2 to 2."""
    import torch

    generator = torch.Generator().manual_seed(rank)
    weights = torch.Generator().manual_seed(-1)
    shape = (width, width)
    return tuple(torch.randint(-2, 3, shape, generator=each).float() for each in (generator, weights))


def expected(operation: str, ranks: int, elements: int) -> list[Any]:
    """The plain computation: what each rank has afterwards, None where it needs nothing. Root is rank 0."""
    import torch

    wholes = torch.stack([whole(rank, elements) for rank in range(ranks)])
    parts = wholes.view(ranks, ranks, elements // ranks)  # [rank, part]
    nothing = [None] * (ranks - 1)
    answers: dict[str, list[Any]] = {
        "broadcast": [wholes[0]] * ranks,
        "reduce": [wholes.sum(0), *nothing],
        "all_reduce": [wholes.sum(0)] * ranks,
        "gather": [parts[:, 0].reshape(-1), *nothing],
        "scatter": list(parts[0]),
        "all_gather": [parts[:, 0].reshape(-1)] * ranks,
        "reduce_scatter": list(parts.sum(0)),
        "all_to_all": [parts[:, rank].reshape(-1) for rank in range(ranks)],
    }
    return answers[operation]
