"""kernels/simd.py: accuracy against float64, special values, and that loops really become SIMD."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")  # a GPU machine may lack it,
pytest.importorskip("scipy")  # and this

from hypothesis import example, given, settings
from hypothesis import strategies as st
from numba import njit
from numba.core.errors import TypingError
from scipy import special

from kernels import simd
from kernels.inspect import inspect_function
from kernels.threads import chunked

X86 = bool({"sse2"} & simd.host_features())


def compiled(function):
    @chunked
    def over(chunk, x, out):
        simd.full_width()
        for i in range(x.size):
            out[i] = function(x[i])

    return over


LOOPS = {
    name: compiled(getattr(simd, f"{name}_float32")) for name in ("exp", "log", "tanh", "erf", "normal_cdf")
}
REFERENCES = {
    "exp": np.exp,
    "log": np.log,
    "tanh": np.tanh,
    "erf": special.erf,
    "normal_cdf": special.ndtr,
}


def evaluate(name, x):
    return applied(LOOPS[name], np.asarray(x, np.float32))


def applied(body, x):
    out = torch.full((len(x),), math.nan)
    body(1, torch.from_numpy(x), out)
    return out.numpy()


def ulps(got, exact):
    """Errors in units in the last place of float32, the spacing at the exact value's size."""
    with np.errstate(over="ignore"):
        size = np.minimum(np.abs(exact), np.finfo(np.float32).max).astype(np.float32)
    return np.abs(got.astype(np.float64) - exact) / np.spacing(size).astype(np.float64)


def samples(low, high):
    random = np.random.default_rng(5)
    wide = np.exp(random.uniform(-100, 4, 200_000)) * random.choice([-1.0, 1.0], 200_000)
    edges = [edge for cut in (0.625, 0.92, 1.0, 4.0) for edge in (cut, np.nextafter(cut, 0), -cut)]
    x = np.concatenate([random.uniform(low, high, 400_000), wide, edges]).astype(np.float32)
    return x[(x >= low) & (x <= high)]


@pytest.mark.parametrize(
    ("name", "low", "high", "bound"),
    [
        ("exp", -103.9, 88.72, 1.1),
        ("log", 1e-45, 3.4e38, 1.0),
        ("tanh", -20, 20, 2.0),
        ("erf", -6, 6, 2.0),
    ],
)
def test_error_is_below_the_bound_that_the_docstring_states(name, low, high, bound):
    x = samples(low, high)
    if name == "log":  # evenly over the exponents, denormals included
        exponents = np.random.default_rng(6).uniform(-149, 127.9, 400_000)
        x = np.concatenate([x, np.exp2(exponents).astype(np.float32)])
    errors = ulps(evaluate(name, x), REFERENCES[name](x.astype(np.float64)))
    assert errors.max() < bound, f"{errors.max()} ulp at {x[errors.argmax()]!r}"


def test_normal_cdf_is_within_its_absolute_bound():
    x = samples(-40, 40)
    assert np.abs(evaluate("normal_cdf", x) - special.ndtr(x.astype(np.float64))).max() < 1.2e-7


@settings(max_examples=300, deadline=None)
@example(value=88.72283172607422, name="exp")  # the last with a finite result, and the next
@example(value=88.72283935546875, name="exp")
@example(value=-103.97207641601562, name="exp")  # the last that is not zero, and the next
@example(value=-103.97208404541016, name="exp")
@example(value=-math.inf, name="exp")
@example(value=2.0**-149, name="log")
@example(value=-0.0, name="log")
@example(value=-0.0, name="tanh")
@example(value=-0.0, name="erf")
@given(value=st.floats(width=32), name=st.sampled_from(["exp", "log", "tanh", "erf"]))
def test_every_float32_gives_the_value_the_limit_or_nan(name, value):
    x = np.float32(value)
    with np.errstate(all="ignore"):
        exact = REFERENCES[name](np.float64(x))
        rounded = np.float32(exact)
    (got,) = evaluate(name, [x])
    if not np.isfinite(rounded):
        assert got == rounded or (np.isnan(got) and np.isnan(rounded))
    else:
        assert ulps(got, exact) < 2.0
        assert got == 0 if exact == 0 else math.copysign(1, got) == math.copysign(1, rounded)
    if name in ("tanh", "erf") and not np.isnan(x):
        assert np.signbit(got) == np.signbit(x)


def test_caller_compiled_with_full_fastmath_keeps_the_accuracy():
    exp = simd.exp_float32

    @chunked(fastmath=True)
    def over(chunk, x, out):
        for i in range(x.size):
            out[i] = exp(x[i])

    x = samples(-80, 80)
    assert ulps(applied(over, x), np.exp(x.astype(np.float64))).max() < 1.1


@pytest.mark.skipif(not X86, reason="the width of registers is read on x86 only")
@pytest.mark.parametrize("name", sorted(LOOPS))
def test_loop_is_packed_at_the_machine_s_full_width(name):
    evaluate(name, [0.5])
    code = inspect_function(LOOPS[name].compiled, LOOPS[name].signatures[0])
    assert code.vector_bits == simd.vector_bits(), code.summary
    assert not code.libm


@pytest.mark.skipif(not X86, reason="instructions of x86")
def test_maximum_vectorises_where_max_does_not():
    maximum, minimum = simd.maximum, simd.minimum

    @chunked(fastmath=())
    def ours(chunk, x, out):
        low = high = x[0]
        for i in range(x.size):
            high = maximum(high, x[i])
            low = minimum(low, x[i])
        out[0], out[1] = low, high

    @njit(error_model="numpy", fastmath=True)
    def plain(x):
        high = x[0]
        for i in range(x.size):
            high = max(high, x[i])
        return high

    for dtype in (torch.float32, torch.float64):
        x = torch.from_numpy(np.random.default_rng(7).standard_normal(1009)).to(dtype)
        out = torch.empty(2, dtype=dtype)
        ours(1, x, out)
        assert out.tolist() == [x.min(), x.max()]
        assert inspect_function(ours.compiled, ours.signatures[-1]).vector_bits >= 128
        assert inspect_function(plain, (x.numpy(),)).vector_bits == 0


def test_minimum_refuses_integers_and_mixed_types():
    minimum = simd.minimum

    @njit
    def smallest(left, right):
        return minimum(left, right)

    for pair in ((1, 2), (np.float32(1), 2.0)):
        with pytest.raises(TypingError):
            smallest(*pair)


WIDTHS = """
import sys
import numpy as np
from numba import njit
from kernels.inspect import inspect_function
from kernels.simd import full_width

@njit(error_model="numpy")
def wide(x, y):
    full_width()
    for i in range(x.size):
        y[i] += x[i] * x[i]

@njit(error_model="numpy")
def ordinary(x, y):
    for i in range(x.size):
        y[i] += x[i] * x[i]

@njit(error_model="numpy")
def caller(x, y):
    wide(x, y)

for function in (wide, ordinary, caller):  # assembly only: this CPU need not have the registers
    print(inspect_function(function, "float32[::1], float32[::1]").vector_bits)
"""


@pytest.mark.skipif(not X86, reason="compiles for an Intel CPU")
def test_full_width_widens_its_own_function_and_no_other():
    """On CPUs for which LLVM prefers 256 bits (most of Intel's with AVX-512)."""
    environment = os.environ | {
        "NUMBA_CPU_NAME": "skylake-avx512",
        "NUMBA_CPU_FEATURES": "+avx512f,+avx512vl",
    }
    done = subprocess.run(
        [sys.executable, "-c", WIDTHS], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.stdout.split() == ["512", "256", "512"], done.stderr


AARCH64 = """
import re
import llvmlite.binding as llvm
from numba import njit
from kernels import simd
from kernels.assembly import read_assembly

@njit(error_model="numpy")
def over(x, out):
    simd.full_width()
    for i in range(x.size):
        out[i] = simd.maximum(simd.erf_float32(x[i]), simd.log_float32(x[i]))

over.compile("float32[::1], float32[::1]")
(text,) = over.inspect_llvm().values()
# The function alone: numba's wrappers around it, made for this CPU, use its atomics.
first, work, *rest = re.split(r"^(?=define )", text, flags=re.M)
rest = [re.sub(r"^define .*?^}$", "", part, flags=re.S | re.M) for part in rest]
lines = [line for line in (first + work + "".join(rest)).splitlines() if not line.startswith("target ")]
llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()
try:
    machine = llvm.Target.from_triple("aarch64-unknown-linux-gnu").create_target_machine()
except RuntimeError as error:
    print("none", error)
else:
    module = llvm.parse_assembly(chr(10).join(lines))
    module.triple, module.data_layout = "aarch64-unknown-linux-gnu", str(machine.target_data)
    code = read_assembly(machine.emit_assembly(module), "over", "", "aarch64")
    print(code.vector_bits, code.packed_fma > 20, sorted(code.libm))
"""


@pytest.mark.proof
def test_mathematics_compiles_for_aarch64_and_stays_packed():
    """The same intermediate code for another CPU: no x86 intrinsic is in it. LLVM aborts where one is."""
    done = subprocess.run(
        [sys.executable, "-c", AARCH64], capture_output=True, text=True, timeout=100, check=False
    )
    if done.stdout.startswith("none"):
        pytest.skip(done.stdout)
    assert done.stdout.split() == ["128", "True", "[]"], done.stderr


@njit
def stream_all(target, source):
    for offset in range(0, source.size, 16):
        simd.stream_16(target, source, offset)
    simd.store_fence()


def test_streamed_stores_arrive():
    source = np.random.default_rng(8).random(4096, dtype=np.float32)[3:-13]  # an unaligned source is fine
    target = simd.aligned_empty(source.size)
    target[:] = np.nan
    stream_all(target, source)
    np.testing.assert_array_equal(target, source)


@pytest.mark.skipif(not X86, reason="the instruction is x86's")
def test_streamed_stores_pass_the_caches():
    stream_all(simd.aligned_empty((16,), np.float32, 64), np.zeros(16, np.float32))
    assembly = "\n".join(stream_all.inspect_asm().values())
    assert "movntps" in assembly
    assert "sfence" in assembly


def test_stream_refuses_what_it_would_misread():
    for kind in (np.float64, np.int32):
        with pytest.raises(TypingError):
            stream_all(np.zeros(16, kind), np.zeros(16, kind))
    with pytest.raises(TypingError):
        stream_all(np.zeros(32, np.float32)[::2], np.zeros(16, np.float32))


@given(rows=st.integers(0, 40), columns=st.integers(0, 40), power=st.integers(0, 12))
def test_aligned_empty_is_aligned_and_whole(rows, columns, power):
    array = simd.aligned_empty((rows, columns), np.float32, 1 << power)
    assert array.shape == (rows, columns)
    assert array.flags.c_contiguous
    assert array.flags.writeable
    assert array.size == 0 or array.ctypes.data % (1 << power) == 0


@pytest.mark.parametrize("alignment", [0, -64, 48])
def test_alignment_must_be_a_power_of_two(alignment):
    with pytest.raises(ValueError, match="power of two"):
        simd.aligned_empty(4, np.float32, alignment)


def test_lanes_follow_from_the_width():
    assert simd.vector_lanes(np.float32) * 32 == simd.vector_bits()
    assert simd.vector_lanes(np.float64) * 64 == simd.vector_bits()
    assert simd.vector_lanes(np.complex128) >= 1
    if "avx512f" in simd.host_features():
        assert simd.vector_lanes() == 16
