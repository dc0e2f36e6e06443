"""How two tensors become one in a reduction."""

from collections.abc import Callable

import torch
import torch.distributed as dist

Combine = Callable[[torch.Tensor, torch.Tensor], None]

# AVG is SUM, divided once at the end: the division is exact for powers of two, and the same on every rank.
_FUNCTIONS = {
    dist.ReduceOp.SUM: torch.add,
    dist.ReduceOp.AVG: torch.add,
    dist.ReduceOp.PRODUCT: torch.mul,
    dist.ReduceOp.MIN: torch.minimum,
    dist.ReduceOp.MAX: torch.maximum,
    dist.ReduceOp.BAND: torch.bitwise_and,
    dist.ReduceOp.BOR: torch.bitwise_or,
    dist.ReduceOp.BXOR: torch.bitwise_xor,
}
NAMES = {operation: str(operation).rpartition(".")[2] for operation in _FUNCTIONS}


def combiner(operation: dist.ReduceOp.RedOpType) -> Combine:
    """``combine(left, right)``: left becomes left op right, element by element, in the tensors' own dtype."""
    function = _FUNCTIONS[operation]

    def combine(left: torch.Tensor, right: torch.Tensor) -> None:
        function(left, right, out=left)

    return combine


def number_of(operation: dist.ReduceOp.RedOpType) -> int:
    """Its place in ``NAMES``; -1 if it is none of them."""
    return list(NAMES).index(operation) if operation in NAMES else -1


def fits(operation: dist.ReduceOp.RedOpType, dtype: torch.dtype) -> str:
    """Why ``operation`` cannot reduce tensors of ``dtype``; empty if it can."""
    if operation not in NAMES:
        return f"reduction {operation} is not one of {', '.join(NAMES.values())}"
    exact = not dtype.is_floating_point and not dtype.is_complex
    if operation == dist.ReduceOp.AVG and exact:
        return f"AVG needs a floating-point dtype, not {dtype}"
    if NAMES[operation] in ("BAND", "BOR", "BXOR") and not exact:
        return f"{NAMES[operation]} needs an integer dtype, not {dtype}"
    if NAMES[operation] in ("MIN", "MAX") and dtype.is_complex:
        return f"{NAMES[operation]} needs an ordered dtype, not {dtype}"
    return ""
