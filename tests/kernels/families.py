"""Which families of operations have Triton kernels."""

from pathlib import Path

KERNELS = Path(__file__).parents[2] / "kernels"


def family_of(operation):
    return operation.function.__module__.split(".")[1]


def has_triton_kernels(family):
    return any((KERNELS / family).glob("gpu*.py"))
