"""Sizes of the lab on JAX's transformations."""

from __future__ import annotations

from dataclasses import dataclass

from labs.lab import setting

DIVIDED = 64  # rows of the sharded product; its other sides are multiples of them


@dataclass(frozen=True)
class Config:
    """Small work, where what JAX adds or saves around the arithmetic can be seen."""

    products: int = setting(
        2000,
        quick=512,
        full=20_000,
        unit="products",
        help="8 x 8 matrix products in a batch",
        minimum=2,
        maximum=1000000,
    )
    samples: int = setting(
        32, full=128, unit="samples", help="of the gradients of each sample", minimum=2, maximum=16384
    )
    features: int = setting(
        64, unit="numbers", help="width of the MLP whose sample gradients are taken", minimum=2, maximum=2048
    )
    width: int = setting(
        256, full=512, unit="numbers", help="width of the MLP that is trained", minimum=2, maximum=16384
    )
    batch: int = setting(
        128, full=256, unit="samples", help="batch of the MLP that is trained", minimum=1, maximum=65536
    )
    steps: int = setting(
        128, quick=64, full=256, unit="steps", help="of the recurrent network", minimum=8, maximum=1024
    )
    hidden: int = setting(64, unit="numbers", help="state of the recurrent network", minimum=2, maximum=2048)
    inputs: int = setting(
        32, unit="numbers", help="inputs of the function whose Jacobian is taken", minimum=2, maximum=8192
    )
    outputs: int = setting(256, full=1024, unit="numbers", help="its outputs", minimum=2, maximum=32768)
    parameters: int = setting(
        64, full=256, unit="numbers", help="of the regression whose Hessian is taken", minimum=2, maximum=8192
    )
    side: int = setting(
        512, full=1024, unit="numbers", help="rows and columns of the softmax", minimum=8, maximum=32768
    )
    lengths: int = setting(
        6, full=16, unit="shapes", help="lengths that one function is called with", minimum=2, maximum=256
    )
    devices: int = setting(
        8, unit="devices", help="host devices of the sharded product", minimum=2, maximum=64
    )
    compile: bool = setting(True, unit="", help="also torch.compile, some 10 s to compile once")

    def __post_init__(self) -> None:
        if self.side % 8:
            raise ValueError(
                f"jax_transforms: side={self.side} is no multiple of 8, the rows of a Pallas block"
            )
        if DIVIDED % self.devices:
            raise ValueError(
                f"jax_transforms: devices={self.devices} do not divide the {DIVIDED} rows of the sharded "
                "product; 2, 4, 8, 16, 32 and 64 do"
            )
        if self.outputs <= self.inputs:
            raise ValueError(
                f"jax_transforms: outputs={self.outputs} are no more than inputs={self.inputs}; the lab's "
                "Jacobian is tall, so that the two modes differ"
            )
