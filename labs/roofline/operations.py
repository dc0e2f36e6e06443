"""The real operations that the lab places on the roofline, as data: what each computes and moves.

One group an operation, one variant a device (and dtype). Counting is done once, here:

- ``flops``: arithmetic operations as usually counted (2 m n k for a product, 1 an element for an addition).
- ``slots``: FMA-sized vector instructions an element when that is what limits; an ``exp`` in SIMD is a
  polynomial of about 20 (Cephes ``expf``: range reduction 4, polynomial 7, scaling and clamping the rest).
- ``reads``, ``writes``: bytes that must cross the cache boundary, each operand once. Softmax passes over
  its row three times, but a row of 4 KiB stays in the first-level cache: only the first pass moves bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from labs.lab import Recorder, Step, Variant

if TYPE_CHECKING:
    from labs.roofline.config import Config

GRAIN = 32768  # at::internal::GRAIN_SIZE: torch gives a thread at least this many elements
COLUMNS = 1024  # of the row-wise operations
EXP_SLOTS = 20
GELU_SLOTS = EXP_SLOTS + 8 + 12  # exp, a division (8 FMA times), the polynomial of erf and the rest
MEMORY = "the bandwidth other users of this machine's memory leave, then and now"
BLAS = "the BLAS library's own efficiency: packing, edges, and its code path for this CPU"


@dataclass(frozen=True)
class Operation:
    """One operation at one size.

    inputs: ``(torch, generator) -> tensors`` in float32 on the CPU.
    function: ``(torch) -> callable`` of the inputs.
    sliced: that many leading inputs, and the output, are cut along dimension 0 for the check.
    pieces: how many threads torch can give it (0: as many as there are).
    suspect: what to suspect first when the prediction is off by more than two.
    ours: ``(kernels) -> callable`` of the same inputs, where ``kernels`` has the operation.
    """

    group: str
    title: str
    inputs: Callable[[Any, Any], tuple[Any, ...]]
    function: Callable[[Any], Callable[..., Any]]
    flops: float
    reads: float
    writes: float
    slots: float = 0.0
    unit: str = "vector"
    dtype: str = "float32"
    pieces: int = 0
    sliced: int = 1
    terms: int = 1
    suspect: str = ""
    ours: Callable[[Any], Callable[..., Any]] | None = None

    @property
    def bytes_moved(self) -> float:
        return self.reads + self.writes

    @property
    def devices(self) -> tuple[str, ...]:
        """What runs it: torch on the CPU and the GPU, and our kernels where there are any (on the CPU)."""
        return ("cpu", "cuda", "kernels") if self.ours is not None else ("cpu", "cuda")

    def name(self, device: str) -> str:
        return device if self.dtype == "float32" else f"{device}_{self.dtype}"

    def address(self, device: str) -> str:
        return f"{self.group}/{self.name(device)}"

    @property
    def seed(self) -> int:
        return sum(map(ord, self.group))


def _random(torch: Any, generator: Any, *shape: int) -> Any:
    return torch.rand(*shape, generator=generator) - 0.5


def _vectors(count: int, elements: int) -> Callable[[Any, Any], tuple[Any, ...]]:
    return lambda torch, generator: tuple(_random(torch, generator, elements) for _ in range(count))


def elementwise(
    group: str, title: str, function: Callable[[Any], Callable[..., Any]], elements: int, inputs: int,
    flops: float = 1.0, slots: float = 0.0, suspect: str = "", ours: Any = None,
) -> Operation:  # fmt: skip
    """``inputs`` vectors in, one out; ``flops`` and ``slots`` an element."""
    return Operation(
        group, f"{title}, {elements:,} elements", _vectors(inputs, elements), function,
        flops=flops * elements, reads=4.0 * inputs * elements, writes=4.0 * elements, slots=slots * elements,
        pieces=-(-elements // GRAIN), sliced=inputs, suspect=suspect or MEMORY, ours=ours,
    )  # fmt: skip


def product(group: str, size: int, dtype: str = "float32", pieces: int = 0, suspect: str = BLAS) -> Operation:
    """(size, size) times (size, size)."""
    width = 4 if dtype == "float32" else 2
    return Operation(
        group, f"matrix product, {size}³ {dtype}",
        lambda torch, generator: tuple(_random(torch, generator, size, size) for _ in range(2)),
        lambda torch: torch.mm,
        flops=2.0 * size**3, reads=2.0 * width * size**2, writes=1.0 * width * size**2,
        unit="matrix", dtype=dtype, pieces=pieces, terms=size, suspect=suspect,
    )  # fmt: skip


def operations(config: Config) -> list[Operation]:
    """All operations of a run, small before large."""
    small, large, rows = config.cache_elements, config.memory_elements, config.rows
    table, matrix, batch = rows * COLUMNS, config.matrix, 16
    images, channels, side = 8, 64, 56
    by_row = 4.0 * table

    def normalize(functions: Any) -> Callable[..., Any]:
        return lambda x, weight, bias: functions.layer_norm(x, (COLUMNS,), weight, bias)

    def table_inputs(torch: Any, generator: Any) -> tuple[Any, ...]:
        return (_random(torch, generator, rows, COLUMNS),)

    return [
        elementwise("add_one", "addition", lambda torch: torch.add, 1, 2,
                    suspect="the cost of one call: another op, allocator and clock than the calibration's"),
        elementwise("add_16k", "addition on one thread", lambda torch: torch.add, GRAIN // 2, 2),
        elementwise("add_cache", "addition in cache", lambda torch: torch.add, small, 2),
        elementwise("relu_cache", "relu in cache", lambda torch: torch.relu, small, 1),
        elementwise("exp_cache", "exp in cache", lambda torch: torch.exp, small, 1, EXP_SLOTS, EXP_SLOTS,
                    suspect="torch passes exp to MKL's vector math, which takes a slower path on CPUs "
                            "that are not Intel's (torch.exp2, which torch computes itself, does not)"),
        elementwise("add_memory", "addition", lambda torch: torch.add, large, 2),
        elementwise("addcmul_memory", "x + y z", lambda torch: torch.addcmul, large, 3, 2.0),
        elementwise("relu_memory", "relu", lambda torch: torch.relu, large, 1),
        elementwise("gelu_memory", "gelu", lambda torch: torch.nn.functional.gelu, large, 1,
                    GELU_SLOTS, GELU_SLOTS, ours=lambda kernels: kernels.gelu),
        Operation("sum_memory", f"sum, {large:,} elements", _vectors(1, large), lambda torch: torch.sum,
                  flops=large, reads=4.0 * large, writes=4.0, sliced=0, terms=large,
                  suspect=MEMORY),
        Operation("layer_norm", f"layer_norm, {rows:,} x {COLUMNS}",
                  lambda torch, generator: (*table_inputs(torch, generator),
                                            *(_random(torch, generator, COLUMNS) for _ in range(2))),
                  lambda torch: normalize(torch.nn.functional), flops=8.0 * table, slots=10.0 * table,
                  reads=by_row, writes=by_row, terms=COLUMNS,
                  suspect="the statistics pass, which this counts as 10 FMA times an element",
                  ours=normalize),
        Operation("softmax", f"softmax, {rows:,} x {COLUMNS}", table_inputs,
                  lambda torch: lambda x: torch.softmax(x, -1), flops=(EXP_SLOTS + 4.0) * table,
                  slots=(EXP_SLOTS + 5.0) * table, reads=by_row, writes=by_row, terms=COLUMNS,
                  suspect="the passes over a row: three in cache, which this counts as free",
                  ours=lambda kernels: lambda x: kernels.softmax(x, -1)),
        Operation("gather", f"gather, {rows:,} rows of {COLUMNS}",
                  lambda torch, generator: (torch.randperm(rows, generator=generator),
                                            *table_inputs(torch, generator)),
                  lambda torch: lambda index, x: torch.index_select(x, 0, index), flops=0.0,
                  reads=by_row + 8.0 * rows, writes=by_row,
                  suspect="rows in random order defeat the prefetcher at each start of a row"),
        Operation("matvec", f"matrix times vector, {config.matvec}²",
                  lambda torch, generator: (_random(torch, generator, config.matvec, config.matvec),
                                            _random(torch, generator, config.matvec)),
                  lambda torch: torch.mv, flops=2.0 * config.matvec**2, reads=4.0 * config.matvec**2,
                  writes=4.0 * config.matvec, terms=config.matvec,
                  suspect="some BLAS libraries run gemv on one thread (MKL on CPUs that are not Intel's)"),
        product("matmul_64", 64, pieces=1),
        product("matmul_128", 128, pieces=1, suspect=BLAS + ", on one thread or several"),
        product("matmul_512", 512),
        product("matmul_large", matrix),
        product("matmul_large", matrix, "bfloat16",
                suspect="without bf16 units the library converts to float32, or computes in plain loops"),
        Operation("bmm", f"{batch} matrix products, 256 x 64 x 256",
                  lambda torch, generator: (_random(torch, generator, batch, 256, 64),
                                            _random(torch, generator, batch, 64, 256)),
                  lambda torch: torch.bmm, flops=batch * 2.0 * 256 * 64 * 256,
                  reads=batch * 4.0 * 2 * 256 * 64, writes=batch * 4.0 * 256 * 256, unit="matrix",
                  sliced=2, terms=64, suspect=BLAS),
        Operation("conv2d", f"3x3 convolution, {images} x {channels} x {side}²",
                  lambda torch, generator: (_random(torch, generator, images, channels, side, side),
                                            _random(torch, generator, channels, channels, 3, 3)),
                  lambda torch: lambda x, weight: torch.nn.functional.conv2d(x, weight, padding=1),
                  flops=2.0 * images * side**2 * channels**2 * 9,
                  reads=4.0 * (images * channels * side**2 + 9 * channels**2),
                  writes=4.0 * images * channels * side**2, unit="matrix", terms=9 * channels,
                  suspect="Winograd needs fewer multiplications than are counted; layout changes need time"),
    ]  # fmt: skip


# --- running them ----------------------------------------------------------------------------------


def make_inputs(torch: Any, operation: Operation) -> tuple[Any, ...]:
    """The operation's inputs on the CPU, the same at each call, in its dtype."""
    generator = torch.Generator().manual_seed(operation.seed)
    dtype = getattr(torch, operation.dtype)
    tensors = operation.inputs(torch, generator)
    return tuple(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors)


def make_setup(operation: Operation, device: str) -> Callable[[Any, Recorder], Step]:
    def setup(config: Any, recorder: Recorder) -> Step:
        import torch

        if device == "kernels" and operation.ours is not None:
            import kernels

            function, place = operation.ours(kernels), "cpu"
        else:
            function, place = operation.function(torch), device
        inputs = tuple(tensor.to(place) for tensor in make_inputs(torch, operation))
        return lambda: function(*inputs)

    return setup


def no_gpu() -> str:
    """Why there is no device for the cuda variants, or "". Imports no torch."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        torch_version = version("torch")
    except PackageNotFoundError:
        return "torch is not installed"
    if torch_version.endswith("+cpu"):
        return f"this torch ({torch_version}) is built without CUDA"
    if not any(os.path.exists(path) for path in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")):
        return "no GPU driver found (/dev/nvidia0, /dev/dxg, /dev/kfd)"
    return ""


def variants(config: Config) -> Sequence[Variant]:
    """Each operation on the CPU, by torch and where we have it by our kernels, and on the first GPU, which is
    listed with a reason where there is none."""
    missing = no_gpu()
    found = []
    for operation in operations(config):
        for device in operation.devices:
            found.append(
                Variant(
                    group=operation.group,
                    name=operation.name(device),
                    setup=make_setup(operation, device),
                    flops=operation.flops,
                    bytes_moved=operation.bytes_moved,
                    working_set=operation.bytes_moved,
                    dtype=operation.dtype,
                    threads=1 if operation.pieces == 1 else 0,
                    clock="cuda" if device == "cuda" else "host",
                    unavailable=missing if device == "cuda" else "",
                )
            )
    return found
