"""kernels/matmul: quantisation within half a step, products of the quantised values, any shape."""

import itertools
import math
import os
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from numba import njit, types
from precision import assert_accurate

import kernels
from kernels.caches import second_level_bytes
from kernels.inspect import assembly_of, inspect_function
from kernels.matmul import cpu_amx, cpu_amx_pack, cpu_linear, cpu_pack, cpu_tile, reference
from kernels.op import FallbackWarning
from kernels.simd import compiled_features

FEATURES = compiled_features()
needs_dot = pytest.mark.skipif(
    not {"avx512f", "avx512bf16"} <= FEATURES, reason="this CPU has no AVX-512 VDPBF16PS"
)


@pytest.fixture(autouse=True)
def kernels_alone(every_size):
    """No crossover to torch for small tensors, and new memory full of NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- quantising ----------------------------------------------------------------------------------


def unpacked(packed, group):
    """The layout as the docstring of ``quantize_int4`` says it, one nibble at a time."""
    rows, width = packed.shape
    out = torch.empty(rows, 2 * width, dtype=torch.int64)
    for byte in range(width):
        start, j = byte // (group // 2) * group, byte % (group // 2)
        out[:, start + j] = (packed[:, byte].long() & 15) - 8
        out[:, start + group // 2 + j] = (packed[:, byte].long() >> 4) - 8
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_is_the_nearest_multiple_of_the_row_s_scale(dtype, device):
    weight = numbers(13, 301, dtype=dtype) * torch.logspace(-4, 3, 13)[:, None].to(dtype)
    weight[4] = 0
    integers, scale = (found.cpu() for found in kernels.quantize_int8(weight.to(device)))
    assert (integers.dtype, scale.dtype) == (torch.int8, torch.float32)
    expected, expected_scale = reference.quantize(weight, 301, 127)
    assert torch.equal(integers, expected)
    assert torch.equal(scale, expected_scale[:, 0])
    assert integers.abs().amax(1).tolist() == [0 if row == 4 else 127 for row in range(13)]
    error = (weight.double() - integers.double() * scale.double()[:, None]).abs()
    assert (error <= scale.double()[:, None] * (0.5 + 1e-5)).all()  # of the division in float32
    assert scale[4] == 0


@pytest.mark.parametrize(("columns", "group"), [(128, 128), (192, 32), (192, 96), (1536, 768)])
def test_int4_is_the_nearest_multiple_of_the_group_s_scale(columns, group, device):
    weight = numbers(7, columns)
    weight[3, :group] = 0
    packed, scale = (found.cpu() for found in kernels.quantize_int4(weight.to(device), group))
    assert packed.shape == (7, columns // 2)
    assert packed.dtype is torch.uint8
    assert scale.shape == (7, columns // group)
    expected, expected_scale = reference.quantize(weight, group, 7)
    integers = unpacked(packed, group)
    assert torch.equal(integers, expected.long())
    assert torch.equal(reference.unpack_int4(packed, scale.shape[1]).long(), integers)
    assert torch.equal(scale, expected_scale)
    step = scale.double().repeat_interleave(group, 1)
    assert ((weight.double() - integers * step).abs() <= step * (0.5 + 1e-6)).all()


def test_ties_go_to_even(device):
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 0.49999997]])
    assert kernels.quantize_int8(weight.to(device))[0].tolist() == [[127, 0, 2, 2, 0, -2, 126, 0]]


@pytest.mark.parametrize("odd", [math.inf, -math.inf, math.nan])
def test_what_no_scale_can_represent_is_refused(odd):
    weight = numbers(5, 64)
    weight[3, 33] = odd
    for quantize in (kernels.quantize_int8, lambda weight: kernels.quantize_int4(weight, 32)):
        with pytest.raises(ValueError, match="row 3 of weight"):
            quantize(weight)


def test_quantising_through_torch_gives_the_same(monkeypatch):
    weight = numbers(9, 256)
    ours = *kernels.quantize_int8(weight), *kernels.quantize_int4(weight)
    monkeypatch.setattr("kernels.op.crossover", lambda name, device: 1 << 40)
    theirs = *kernels.quantize_int8(weight), *kernels.quantize_int4(weight)
    assert all(torch.equal(left, right) for left, right in zip(ours, theirs, strict=True))


def test_quantising_passes_opcheck_and_compiles():
    torch.use_deterministic_algorithms(False)
    weight = numbers(5, 64)
    torch.library.opcheck(torch.ops.perflab.quantize_int8.default, (weight,))
    torch.library.opcheck(torch.ops.perflab.quantize_int4.default, (weight, 32))
    compiled = torch.compile(kernels.quantize_int4, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(weight, 32), kernels.quantize_int4(weight, 32), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0)])
def test_empty_weights(shape):
    integers, scale = kernels.quantize_int8(torch.empty(shape))
    assert integers.shape == shape
    assert torch.equal(scale, torch.zeros(shape[0]))
    packed, scale = kernels.quantize_int4(torch.empty(shape), 32)
    assert packed.shape == (shape[0], shape[1] // 2)
    assert scale.shape == (shape[0], shape[1] // 32)
    assert torch.equal(kernels.linear_int4(torch.ones(2, shape[1]), packed, scale), torch.zeros(2, shape[0]))


# --- linear --------------------------------------------------------------------------------------

INT8 = torch.ones(5, 64, dtype=torch.int8)
INT4 = torch.ones(5, 32, dtype=torch.uint8)
X = torch.ones(2, 64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: kernels.quantize_int8(INT8), TypeError, "weight is int8"),
        (lambda: kernels.quantize_int8(torch.ones(3)), ValueError, r"\(out_features, in_features\)"),
        (lambda: kernels.quantize_int4(X, 24), ValueError, "multiple of 32 that divides in_features=64"),
        (lambda: kernels.quantize_int4(X), ValueError, "group_size=128"),
        (lambda: kernels.quantize_int4(X, 32.0), TypeError, "must be an int"),
        (lambda: kernels.linear_int8(X, INT4, torch.ones(5)), TypeError, "quantize_int8 makes it int8"),
        (lambda: kernels.linear_int4(X, INT8, torch.ones(5, 1)), TypeError, "quantize_int4 makes it uint8"),
        (lambda: kernels.linear_int8(X[:, :9], INT8, torch.ones(5)), ValueError, "64 in_features"),
        (lambda: kernels.linear_int8(X, INT8, torch.ones(5, 1)), ValueError, r"must be \(5,\)"),
        (lambda: kernels.linear_int8(X, INT8, torch.ones(5).half()), TypeError, "must be float32"),
        (lambda: kernels.linear_int8(X.int(), INT8, torch.ones(5)), TypeError, "input is int32"),
        (lambda: kernels.linear_int8(X, INT8[0], torch.ones(5)), ValueError, "two dimensions"),
        (
            lambda: kernels.linear_int8(X, INT8, torch.ones(5), torch.ones(4)),
            ValueError,
            r"bias has shape \(4,\)",
        ),
        (
            lambda: kernels.linear_int8(X, INT8, torch.ones(5), torch.ones(5).half()),
            TypeError,
            "bias is float16",
        ),
        (lambda: kernels.linear_int4(X, INT4, torch.ones(5)), ValueError, "in_features / group_size"),
        (lambda: kernels.linear_int4(X, INT4, torch.ones(5, 4)), ValueError, "4 groups a row"),
        (lambda: kernels.matmul_bf16(X, X), TypeError, "both must be bfloat16"),
        (lambda: kernels.matmul_bf16(X.bfloat16(), X.bfloat16()), ValueError, r"\(2, 64\) and b \(2, 64\)"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_double_precision_runs_torch_s_own_and_says_so(monkeypatch):
    monkeypatch.setattr("kernels.op._warned", set())
    integers, scale = kernels.quantize_int8(numbers(5, 64))
    with pytest.warns(FallbackWarning, match="float64"):
        got = kernels.linear_int8(X.double(), integers, scale)
    assert torch.equal(got, reference.linear_int8(X.double(), integers, scale))


def test_one_row_and_many_rows_agree_on_every_row():
    """Both ways of computing, on either side of the number of rows where one gives way to the other."""
    quantized = kernels.quantize_int4(numbers(37, 128), 64)
    x = numbers(cpu_linear.FEW_ROWS + 3, 128, seed=1, dtype=torch.bfloat16)
    whole = kernels.linear_int4(x, *quantized)
    for rows in (1, 2, cpu_linear.FEW_ROWS, cpu_linear.FEW_ROWS + 1):
        torch.testing.assert_close(kernels.linear_int4(x[:rows], *quantized), whole[:rows])


# --- bfloat16 products ---------------------------------------------------------------------------

SHAPES = [
    (1, 1, 1),
    (1, 517, 33),
    (13, 31, 7),
    (197, 530, 131),
    (12, 1024, 32),
    (97, 1, 3),
    (0, 5, 3),
    (4, 0, 3),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_product_is_as_accurate_as_torch_s(shape):
    m, k, n = shape
    a, b = numbers(m, k, dtype=torch.bfloat16), numbers(k, n, seed=1, dtype=torch.bfloat16)
    exact = a.double() @ b.double()
    for left in (a, a.t().contiguous().t()):
        for right in (b, b.t().contiguous().t(), torch.stack([b, b], -1)[..., 0]):
            assert_accurate(kernels.matmul_bf16(left, right), a @ b, exact, "product")


@pytest.mark.parametrize("transposed", [False, True])
def test_bfloat16_gradients_are_as_accurate_as_torch_s(transposed):
    a, b = numbers(67, 45, dtype=torch.bfloat16), numbers(45, 83, seed=1, dtype=torch.bfloat16)
    weight = numbers(67, 83, seed=2, dtype=torch.bfloat16)
    if transposed:
        a, b = a.t().contiguous().t(), b.t().contiguous().t()

    def gradients(function, *factors):
        factors = [factor.detach().requires_grad_() for factor in factors]
        return torch.autograd.grad(function(*factors), factors, weight.to(factors[0].dtype))

    exact = gradients(torch.matmul, a.double(), b.double())
    theirs = gradients(torch.matmul, a, b)
    ours = gradients(kernels.matmul_bf16, a, b)
    for values in zip(ours, theirs, exact, strict=True):
        assert_accurate(*values, "gradient")
    alone = a.detach().requires_grad_()
    (only,) = torch.autograd.grad(kernels.matmul_bf16(alone, b), alone, weight)
    assert torch.equal(only, ours[0])


def test_bfloat16_product_of_more_or_fewer_dimensions():
    a, b = numbers(2, 3, 5, 8, dtype=torch.bfloat16), numbers(8, 6, dtype=torch.bfloat16)
    torch.testing.assert_close(kernels.matmul_bf16(a, b), a @ b)
    torch.testing.assert_close(kernels.matmul_bf16(a[0, 0, 0], b), a[0, 0, 0] @ b)


def test_bfloat16_product_compiles_passes_opcheck_and_needs_no_certain_threads():
    a, b = numbers(300, 64, dtype=torch.bfloat16), numbers(64, 140, dtype=torch.bfloat16)
    expected = kernels.matmul_bf16(a, b)
    compiled = torch.compile(kernels.matmul_bf16, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a, b), expected)
    threads = torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            assert torch.equal(kernels.matmul_bf16(a, b), expected)
    finally:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.library.opcheck(
        torch.ops.perflab.matmul_bf16.default, (a.requires_grad_(), b.t().contiguous(), False, True)
    )


# --- what the compiler made of them --------------------------------------------------------------


@pytest.mark.skipif("avx512f" not in FEATURES, reason="counts 512-bit instructions")
@pytest.mark.parametrize("bits", [8, 4])
def test_inner_products_stay_in_full_registers(bits):
    kernels.linear_int8(X[:1], INT8, torch.ones(5))
    kernels.linear_int4(X[:1], INT4, torch.ones(5, 2))
    body = cpu_linear._few_int8 if bits == 8 else cpu_linear._few_int4
    code = inspect_function(body.compiled, body.signatures[-1])
    assert code.packed_fma >= 16 + 4, (
        code.summary
    )  # tiles of 4 x 4 and 1 x 4; what is scalar is the end of a row
    assert not code.libm
    assembly = assembly_of(body.compiled, body.signatures[-1])
    converted, looked_up = assembly.count("vcvtdq2ps"), len(re.findall("\tvperm(?:ps|d)\t.*zmm", assembly))
    assert (converted, looked_up)[bits == 4] >= 8, "weights are widened in registers"
    assert "prefetch" in assembly


@needs_dot
def test_tile_of_pairs_keeps_its_sums_in_registers():
    multiply = cpu_tile.dot_tile().multiply

    @njit
    def run(a, b, c, scale, steps):
        multiply(a, 0, b, 0, steps, scale, 0, c, 0, 32)

    assembly = assembly_of(run, (*[types.float32[::1]] * 4, types.int64))
    lines = [line for line in assembly.splitlines() if "vdpbf16ps" in line]
    assert len(lines) >= 24
    assert all("zmm" in line for line in lines)
    assert not any("%rsp" in line or "%rbp" in line for line in assembly.splitlines() if "zmm" in line)


# --- AMX, as far as it goes without the unit -----------------------------------------------------


def blocks_of(lines, depth, values):
    """(lines, k) filled up with zeros to whole blocks: (panels, blocks, 32 lines, 32 k)."""
    panels, blocks = -(-lines // 32), -(-depth // 32)
    padded = torch.zeros(32 * panels, 32 * blocks, dtype=torch.float64)
    padded[:lines, :depth] = values.double()
    return padded.view(panels, 32, blocks, 32).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_parts_of_a_number_add_up_to_it(dtype):
    """Rows of A for AMX: in blocks, and nothing is lost of a number whatever its magnitude."""
    source = numbers(45, 75) * torch.logspace(-4, 4, 75)
    source = (source if dtype is torch.float16 else source * torch.logspace(-12, 12, 45)[:, None]).to(dtype)
    parts = cpu_amx_pack.PARTS[dtype]
    out = torch.full((2, 3, parts * 1024), math.nan, dtype=torch.bfloat16)
    cpu_amx_pack.pack_rows(parts)(2, source if parts == 1 else source.float(), out)
    assert torch.equal(out.double().view(2, 3, parts, 32, 32).sum(2), blocks_of(45, 75, source))


def test_what_is_not_finite_is_its_first_part():
    hidden = torch.tensor([0x7F800001, 0x7F800000, -0x800000], dtype=torch.int32)  # a NaN, inf, -inf
    out = torch.empty((1, 1, 3 * 1024), dtype=torch.bfloat16)
    cpu_amx_pack.pack_rows(3)(1, hidden.view(torch.float32)[None], out)
    parts = out.view(3, 32, 32)[:, 0, :3]
    assert parts[0].isnan().tolist() == [True, False, False]
    assert parts[0, 1:].tolist() == [math.inf, -math.inf]
    assert torch.equal(parts[1:], torch.zeros(2, 3, dtype=torch.bfloat16))


def columns_for_amx(blocks):
    """(panels, blocks, 32 columns, 32 k) as TDPBF16PS reads it: pairs of k, in each the columns."""
    panels, deep = blocks.shape[:2]
    pairs = blocks.reshape(panels, deep, 32, 16, 2).transpose(2, 3)
    return pairs.reshape(panels, deep, 1024)


def test_columns_for_amx_are_what_the_instruction_reads():
    source = numbers(75, 337, dtype=torch.bfloat16)
    for first in (0, 64):
        panels = -(-(337 - first) // 32)
        expected = columns_for_amx(blocks_of(337 - first, 75, source[:, first:].t()))
        for transposed in (False, True):
            out = torch.full((panels, 3, 1024), math.nan, dtype=torch.bfloat16)
            if transposed:
                cpu_amx_pack.pack_lines(16)(panels, source.t().contiguous(), first, 1, out)
            else:
                cpu_amx_pack.pack_columns(source, first, out)
            assert torch.equal(out.double(), expected)


@pytest.mark.skipif("avx512bw" not in FEATURES, reason="int4 weights are looked up by VPERMW")
@pytest.mark.parametrize(("bits", "depth", "group"), [(8, 75, 1), (4, 192, 96), (4, 256, 128), (4, 64, 32)])
def test_weights_for_amx_are_what_the_instruction_reads(bits, depth, group):
    if bits == 8:
        source = torch.randint(-127, 128, (45, depth), dtype=torch.int8)
        values = source
    else:
        packed, scale = kernels.quantize_int4(numbers(45, depth), group)
        source, values = packed.view(torch.int8), reference.unpack_int4(packed, scale.shape[1])
    out = torch.full((1, -(-depth // 32), 1024), math.nan, dtype=torch.bfloat16)
    cpu_amx_pack.pack_lines(bits)(1, source, 32, group, out)
    assert torch.equal(out.double(), columns_for_amx(blocks_of(13, depth, values[32:])))


needs_tiles = pytest.mark.skipif(not cpu_amx.usable(), reason="this CPU has no AMX, or does not lend it")


@needs_tiles
def test_the_size_of_the_cache_changes_nothing(monkeypatch):
    """Other chunks and strips; more rows, columns and k than one has."""
    a, b = numbers(299, 1100, dtype=torch.bfloat16), numbers(1100, 333, seed=1, dtype=torch.bfloat16)
    quantized = kernels.quantize_int4(numbers(333, 1152, seed=2), 96)
    x = numbers(299, 1152, seed=3)
    expected = kernels.matmul_bf16(a, b), kernels.linear_int4(x, *quantized)
    for size in (1 << 14, 1 << 18, 1 << 26):
        monkeypatch.setattr(cpu_amx, "second_level_bytes", lambda size=size: size)
        assert torch.equal(kernels.matmul_bf16(a, b), expected[0])
        assert torch.equal(kernels.linear_int4(x, *quantized), expected[1])


@pytest.mark.parametrize("bits", [8, 4])
def test_activations_that_are_not_finite_show(bits):
    quantize = kernels.quantize_int8 if bits == 8 else partial(kernels.quantize_int4, group_size=32)
    linear, theirs = (getattr(place, f"linear_int{bits}") for place in (kernels, reference))
    quantized = quantize(numbers(40, 64))
    x = numbers(40, 64, seed=1)
    x[3, 5], x[7, 9], x[11, 2] = math.inf, -math.inf, math.nan
    got, expected = linear(x, *quantized), theirs(x, *quantized)
    torch.testing.assert_close(got, expected, equal_nan=True)


AMX = """
from kernels.inspect import _argument_types, assembly_of
from kernels.matmul import cpu_amx
body = cpu_amx._product(3).compiled
factors, of_groups, of_columns = "uint16[:,:,::1]", "float32[:,::1]", "float32[::1]"
signature = f"int64, boolean, int64, int64, int64, {factors}, {factors}, {of_groups}, int64, {of_columns}, "
signature += f"{of_columns}, float32[:,::1]"
assembly = assembly_of(body, _argument_types(body, signature))
names = ("ldtilecfg", "tilezero", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease")
print(*(assembly.count(chr(9) + name) for name in names))
"""


@pytest.mark.proof
@pytest.mark.skipif("sse2" not in FEATURES, reason="compiles for an Intel CPU")
def test_amx_product_compiles_for_sapphire_rapids():
    """Machine code only: nothing here executes it."""
    features = "avx,avx2,fma,f16c,avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,amx-tile,amx-bf16"
    environment = os.environ | {
        "NUMBA_CPU_NAME": "sapphirerapids",
        "NUMBA_CPU_FEATURES": ",".join(f"+{name}" for name in features.split(",")),
    }
    done = subprocess.run(
        [sys.executable, "-c", AMX], env=environment, capture_output=True, text=True, timeout=100
    )
    configure, zero, load, multiply, store, release = map(int, done.stdout.split() or [0] * 6)
    assert (configure, release) == (1, 1), done.stderr
    assert min(zero, store) >= 4
    # Four products of each of three parts, from two tiles of B and six of A.
    assert multiply >= 12
    assert multiply % 12 == 0
    assert load == multiply // 12 * 8


GENERIC = """
import torch, kernels
from kernels.matmul import reference
weight = torch.randn(37, 96)
for bits, quantized in ((8, kernels.quantize_int8(weight)), (4, kernels.quantize_int4(weight, 32))):
    for rows in (1, 5, 40):
        x = torch.randn(rows, 96, requires_grad=True)
        results = []
        for place in (kernels, reference):
            out = getattr(place, f"linear_int{bits}")(x, *quantized)
            results.append((out, *torch.autograd.grad(out.sum(), x)))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)
a, b = torch.randn(5, 7).bfloat16(), torch.randn(7, 9).bfloat16()
assert torch.equal(kernels.matmul_bf16(a, b), a @ b)
print("right")
"""


@pytest.mark.proof
@pytest.mark.parametrize(
    "cpu",
    [{"NUMBA_CPU_NAME": "generic"}, {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma"}],
)
def test_narrow_cpus_compute_the_same(cpu):
    done = subprocess.run(
        [sys.executable, "-c", GENERIC], env=os.environ | cpu, capture_output=True, text=True, timeout=100
    )
    assert done.stdout.strip() == "right", done.stderr


@pytest.mark.parametrize(("rows", "pair"), [(12, 1), (32, 2)])
def test_a_panel_is_the_transpose(rows, pair):
    dtype = torch.float32 if pair == 1 else torch.bfloat16
    source = numbers(rows + 3, 43, dtype=dtype)
    words = -(-43 // pair)
    out = torch.full((2, words, rows), math.nan)
    cpu_pack.pack_lines(rows, pair, False)(2, source, 0, 43, 0, 1, out)
    padded = torch.zeros(2 * rows, words * pair, dtype=dtype)
    padded[: rows + 3, :43] = source
    panels = padded.unflatten(0, (2, rows)).unflatten(2, (words, pair)).transpose(1, 2).contiguous()
    assert torch.equal(out, panels.view(torch.float32).reshape(2, words, rows))


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("cores", [1, 2, 7, 64])
def test_every_thread_has_chunks_of_each_strip_whose_sums_fit_the_cache(parts, cores):
    for panels, across in itertools.product([1, 2, 3, 8, 31, 48, 300], repeat=2):
        tall, wide = cpu_amx._chunk_sizes(panels, across, parts, cores)
        chunks = -(-panels // tall) * -(-across // wide)
        assert chunks >= min(2 * cores, panels * across) / 2  # one each for want of an even division
        assert tall * wide * 4 * cpu_amx.BLOCK <= max(second_level_bytes() // 4, 4 * cpu_amx.BLOCK * tall)
        assert 2 * cpu_amx.BLOCK * parts * cpu_amx._DEPTHS[parts] * tall <= second_level_bytes() * 3 // 8
