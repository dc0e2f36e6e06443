"""Quantised linear layers and bfloat16 products: sizes, bytes, peers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from kernels import matmul
from kernels.matmul import reference
from kernels.spec import Arguments, Benchmark, Case, Operation, Sized, Step, tensor_bytes


def _case(rows: tuple[int, ...], out: int, inner: int, bits: int, bias: bool = True, group: int = 32) -> Case:
    def make(dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        weight = torch.randn(out, inner, generator=generator) / max(1, inner) ** 0.5
        quantized = matmul.quantize_int8(weight) if bits == 8 else matmul.quantize_int4(weight, group)
        return {
            "input": torch.randn(*rows, inner, generator=generator).to(dtype),
            f"weight_int{bits}": quantized[0],
            "scale": quantized[1],
            "bias": torch.randn(out, generator=generator).to(dtype) if bias else None,
        }

    label = "x".join(map(str, rows)) + f" of {out}x{inner}" + ("" if bias else " no bias")
    return Case(label + (f" group {group}" if bits == 4 else ""), make)


def _weight(arguments: Arguments) -> torch.Tensor:
    return arguments["weight_int8"] if "weight_int8" in arguments else arguments["weight_int4"]


def _bytes(arguments: Arguments, backward: bool) -> int:
    """Weights, activations and outputs once each; backward reads the gradient and writes the input's."""
    weight, input = _weight(arguments), arguments["input"]
    result = input.shape[:-1].numel() * weight.shape[0] * input.element_size()
    return tensor_bytes(weight, arguments["scale"], input) + result


def _flops(arguments: Arguments, backward: bool) -> int:
    return 2 * arguments["input"].numel() * _weight(arguments).shape[0]


def _torch_int8(arguments: Arguments, direction: str) -> Step | None:
    """torch's own kernel for int8 weights; it has no gradient, and takes scales in the input's dtype."""
    if direction != "forward":
        return None
    input, scale = arguments["input"], arguments["scale"].to(arguments["input"].dtype)
    return lambda: torch._weight_int8pack_mm(input, arguments["weight_int8"], scale)


def _torch_int4(arguments: Arguments, direction: str) -> Step | None:
    """torch's own kernel for int4 weights, of which it takes groups of a power of two up to 256."""
    input, scale = arguments["input"], arguments["scale"]
    if direction != "forward" or input.device.type != "cpu":
        return None
    integers = reference.unpack_int4(arguments["weight_int4"], scale.shape[1])
    group = integers.shape[1] // scale.shape[1]
    packed = torch._convert_weight_to_int4pack_for_cpu((integers + 8).int(), 2)
    factors = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1).contiguous().to(input.dtype)
    return lambda: torch._weight_int4pack_mm_for_cpu(input, packed, group, factors)


def _as_float(unpack: Callable[..., torch.Tensor], weight: str) -> Callable[[Arguments, str], Step | None]:
    """The product with a weight that was dequantised before: what quantisation is to beat."""

    def peer(arguments: Arguments, direction: str) -> Step | None:
        if direction != "forward":
            return None
        input = arguments["input"]
        full = unpack(arguments[weight], arguments["scale"]).to(input.dtype)
        if input.dim() == 2 and len(input) == 1:
            return lambda: torch.mv(full, input[0])
        return lambda: F.linear(input, full)

    return peer


def _jax_int8(arguments: Arguments, direction: str) -> Step | None:
    input = arguments["input"]
    if direction != "forward" or input.device.type != "cpu" or input.dtype is not torch.float32:
        return None
    import jax
    import jax.numpy as jnp

    x, weight, scale = (jnp.asarray(arguments[name].numpy()) for name in ("input", "weight_int8", "scale"))
    run = jax.jit(lambda x, weight, scale: (x @ weight.astype(x.dtype).T) * scale)
    return lambda: run(x, weight, scale).block_until_ready()


OPERATIONS = [
    Operation(
        name="linear_int8",
        function=matmul.linear_int8,
        reference=reference.linear_int8,
        eager=reference.linear_int8,
        cases=[
            _case((1,), 1, 1, 8),
            _case((97,), 19, 131, 8),
            _case((5,), 523, 131, 8),
            _case((1,), 1031, 127, 8, bias=False),
            _case((2, 97), 141, 67, 8),
            _case((205,), 70, 1100, 8, bias=False),
            _case((0,), 7, 8, 8),
            _case((3,), 5, 0, 8),
        ],
        sizes=[_case((1,), 16384, 4096, 8, bias=False), _case((512,), 4096, 4096, 8, bias=False)],
        bytes_moved=_bytes,
        flops=_flops,
        gradients=("input", "bias"),
        peers={
            "torch int8 kernel": _torch_int8,
            "float weight": _as_float(reference.dequantize_int8, "weight_int8"),
            "jax.jit": _jax_int8,
        },
        targets={"forward": 1.0},
        sized=lambda rows, columns: _case((8,), rows, columns, 8),
        counted=lambda arguments: arguments["weight_int8"].numel(),
    ),
    Operation(
        name="linear_int4",
        function=matmul.linear_int4,
        reference=reference.linear_int4,
        eager=reference.linear_int4,
        cases=[
            _case((1,), 3, 32, 4),
            _case((5,), 523, 160, 4),
            _case((1,), 1031, 96, 4, bias=False),
            _case((1,), 1031, 512, 4, group=256),
            _case((2, 97), 141, 192, 4, group=96),
            _case((205,), 70, 1536, 4, bias=False, group=768),
            _case((0,), 7, 64, 4),
        ],
        sizes=[
            _case((1,), 16384, 4096, 4, bias=False, group=128),
            _case((512,), 4096, 4096, 4, bias=False, group=128),
        ],
        bytes_moved=_bytes,
        flops=_flops,
        gradients=("input", "bias"),
        peers={
            "torch int4 kernel": _torch_int4,
            "float weight": _as_float(reference.dequantize_int4, "weight_int4"),
        },
        targets={"forward": 1.0},
        sized=lambda rows, columns: _case((8,), rows, columns, 4),
        counted=lambda arguments: arguments["weight_int4"].numel(),
    ),
]


def _quantize_ways(name: str, rows: int, columns: int, device: str, **options: int) -> dict[str, Step]:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(device)
    ours, theirs = getattr(matmul, name), getattr(reference, name)
    return {"kernels": lambda: ours(weight, **options), "torch": lambda: theirs(weight, **options)}


def _quantization(name: str, levels: int, group: int) -> Benchmark:
    rows, columns = 4096, 4096

    def ways(device: str) -> Mapping[str, Step]:
        found = _quantize_ways(name, rows, columns, device)
        return {**found, "torch.compile": torch.compile(found["torch"])}

    written = rows * columns // (1 if levels == 127 else 2) + 4 * rows * columns // group
    label = f"{rows}x{columns}"
    return Benchmark(name, "forward", label, torch.float32, ways, 4 * rows * columns + written)


def _product_ways(m: int, k: int, n: int, device: str) -> dict[str, Step]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(m, k, generator=generator).bfloat16().to(device)
    b = torch.randn(k, n, generator=generator).bfloat16().to(device)
    out = torch.empty(m, n, dtype=torch.bfloat16, device=device)
    return {
        "kernels": lambda: matmul.matmul_bf16(a, b),
        "torch": lambda: a @ b,
        "out=": lambda: torch.mm(a, b, out=out),
    }


def _product(m: int, k: int, n: int) -> Benchmark:
    def ways(device: str) -> Mapping[str, Step]:
        return _product_ways(m, k, n, device)

    label = f"{m}x{k}x{n}"
    moved = 2 * (m * k + k * n + m * n)
    return Benchmark("matmul_bf16", "forward", label, torch.bfloat16, ways, moved, 2 * m * k * n, 0.8)


BENCHMARKS = [
    _quantization("quantize_int8", 127, 4096),
    _quantization("quantize_int4", 7, 128),
    _product(1024, 1024, 1024),
    _product(1536, 1024, 4096),
]


def _sized_quantization(name: str, **options: int) -> Sized:
    def ways(rows: int, columns: int, device: str) -> tuple[int, Step, Step]:
        found = _quantize_ways(name, rows, columns, device, **options)
        return rows * columns, found["kernels"], found["torch"]

    return Sized(name, ways)


def _sized_product(rows: int, columns: int, device: str) -> tuple[int, Step, Step]:
    found = _product_ways(rows, columns, columns, device)
    return rows * columns, found["kernels"], found["torch"]


SIZED = [
    _sized_quantization("quantize_int8"),
    _sized_quantization("quantize_int4", group_size=32),
    Sized("matmul_bf16", _sized_product),
]
