"""Building blocks with which numba loops become full-width SIMD.

numba's LLVM carries no vector mathematics library (SVML left with llvmlite 0.45), so every ``exp``,
``log``, ``tanh`` and ``erf`` of a compiled loop is a call of the scalar libm, and one call keeps the
whole loop scalar. On many AVX-512 CPUs LLVM also prefers 256-bit registers. The remedies, all plain
numba, none of which changes numba's settings for anybody else:

1. ``full_width()`` in the function that holds the loop asks LLVM for 512-bit registers there;
2. ``exp_float32`` and the functions built on it are branch-free arithmetic, so they vectorise;
3. ``maximum`` and ``minimum`` are one instruction; ``if x < m: m = x`` is a branch, and numba's ``max``
   stays scalar even under fastmath;
4. compile with ``error_model="numpy"``: Python's test for a zero divisor blocks SIMD;
5. ``stream_16`` stores past the caches, so that an output larger than them is not read to be overwritten.

A sum is vectorised only where addition may be reordered (``fastmath={"reassoc", "contract", "nsz"}``).
``kernels.inspect`` shows what became of a loop. Without AVX-512 all of this works in narrower registers.

Error bounds are in units in the last place (ulp) of float32 against float64, on all finite inputs.
The functions keep their bounds, infinities and NaN when a caller is compiled with fastmath: flags belong
to instructions, and these carry only "contract". A caller under ``nnan`` or ``ninf`` gives that up for its
own arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

f32 = np.float32
STREAM_BYTES = 64  # one 16-lane float32 vector, one cache line


# --- what the machine has ------------------------------------------------------------------------


def host_features() -> frozenset[str]:
    """LLVM's names of this CPU's features (``avx512f``, ``avx2``, ``fma``, ``neon``, ...)."""
    import llvmlite.binding as llvm

    return frozenset(name for name, present in llvm.get_host_cpu_features().items() if present)


def compiled_features() -> frozenset[str]:
    """LLVM's names of the features that numba compiles for: the host's, unless NUMBA_CPU_FEATURES says
    others, or NUMBA_CPU_NAME that there are none.

    An instruction that is not among them stops LLVM, and with it the process.
    """
    if config.CPU_FEATURES is None:
        return host_features()
    return frozenset(name[1:] for name in config.CPU_FEATURES.split(",") if name.startswith("+"))


def vector_bits(features: frozenset[str] | None = None) -> int:
    """Width of the widest SIMD register of a CPU with these features, by default of this one: 512, 256 or
    128; 64 when unknown."""
    if features is None:
        features = host_features()
    if "avx512f" in features:
        return 512
    if "avx" in features:
        return 256
    return 128 if features & {"sse2", "neon", "vsx", "vector"} else 64


def vector_lanes(dtype: Any = np.float32) -> int:
    """Elements of ``dtype`` in one SIMD register of ``vector_bits()``; 1 without SIMD."""
    return max(1, vector_bits() // 8 // np.dtype(dtype).itemsize)


def aligned_empty(
    shape: int | tuple[int, ...], dtype: Any = np.float32, alignment: int = STREAM_BYTES
) -> np.ndarray:
    """An uninitialised C-contiguous array whose first byte lies on a multiple of ``alignment`` bytes.

    numpy's own arrays start at 16 bytes past a page when they are large. ValueError when ``alignment``
    is no power of two.
    """
    if alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"alignment={alignment} is not a power of two")
    kind = np.dtype(dtype)
    bytes_needed = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    memory = np.empty(bytes_needed + alignment, np.uint8)
    start = -memory.ctypes.data % alignment
    return memory[start : start + bytes_needed].view(kind).reshape(shape)


# --- LLVM: width, minimum and maximum, bits ------------------------------------------------------


@intrinsic
def full_width(typing):
    """Ask for 512-bit registers in the function that this call stands in; nothing elsewhere.

    The LLVM function attribute ``"prefer-vector-width"="512"`` (what clang's
    ``-mprefer-vector-width=512`` sets). It belongs to the function whose *loop* is to be wide: inside a
    ``prange`` body for a parallel loop, not in a small function that is inlined into the loop. It survives
    numba's cache and inlining into a caller, since the loop is vectorised before that. CPUs that have only
    narrower registers ignore it.
    """

    def codegen(context, builder, signature, args):
        # llvmlite accepts only the attributes it knows; the set below it accepts any, and prints them as
        # they are, quoted as LLVM wants a string attribute.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), codegen


def binary(name: str, flags: tuple[str, ...], doc: str) -> Callable[..., Any]:
    """An intrinsic that calls ``name.f32`` or ``name.f64`` of LLVM on two floats of one type."""

    @intrinsic
    def call(typing, left, right):
        if left != right or left not in (types.float32, types.float64):
            return None  # numba then reports that no implementation takes these types

        def codegen(context, builder, signature, args):
            kind = args[0].type
            suffix = "f32" if signature.return_type is types.float32 else "f64"
            declared = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(kind, [kind, kind]), f"{name}.{suffix}"
            )
            return builder.call(declared, args, fastmath=flags)

        return left(left, right), codegen

    call.__doc__ = doc
    return call


# No "fast", whose ninf would make an infinite operand undefined, and with it what is compared to -inf later.
_ORDERED = ("nnan", "nsz", "reassoc")
maximum = binary(
    "llvm.maxnum", _ORDERED, "The larger of two float32 or float64; one instruction. Undefined for NaN."
)
minimum = binary(
    "llvm.minnum", _ORDERED, "The smaller of two float32 or float64; one instruction. Undefined for NaN."
)
copy_sign = binary("llvm.copysign", (), "The magnitude of the first argument with the sign of the second.")


@intrinsic
def float_as_bits(typing, value):
    """The 32 bits of a float32, as int32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return (types.int32(value), codegen) if value is types.float32 else None


@intrinsic
def bits_as_float(typing, bits):
    """The float32 with these 32 bits. Wider integers (int32 + int32 is int64 in numba) are cut."""

    def codegen(context, builder, signature, args):
        word = args[0]
        if word.type.width > 32:
            word = builder.trunc(word, ir.IntType(32))
        return builder.bitcast(word, ir.FloatType())

    return (
        (types.float32(bits), codegen)
        if bits in (types.int32, types.uint32, types.int64, types.uint64)
        else None
    )


@intrinsic
def _times_power_of_two(typing, value, shifted):
    """value * 2**n, where n is what was added to 1.5 * 2**23 to give ``shifted``.

    In two factors, 2**(n >> 1) and 2**(n - (n >> 1)): a single one would overflow the exponent where the
    product is a denormal or reaches 2**128. Integer arithmetic stays in 32 bits, 16 lanes at a time.
    """

    def codegen(context, builder, signature, args):
        word = ir.IntType(32)
        n = builder.sub(builder.bitcast(args[1], word), word(0x4B400000))
        half = builder.ashr(n, word(1))
        result = args[0]
        for part in (half, builder.sub(n, half)):
            factor = builder.bitcast(builder.shl(builder.add(part, word(127)), word(23)), ir.FloatType())
            result = builder.fmul(result, factor)
        return result

    return (types.float32(value, shifted), codegen) if value is types.float32 is shifted else None


# --- mathematics ---------------------------------------------------------------------------------

_inline = njit(error_model="numpy", fastmath={"contract"}, forceinline=True)

# Rounds a float32 below 2**22 to an integer: the sum's last bit is worth one.
_ROUND = f32(12582912.0)
_LOG2_E = f32(1.4426950408889634)
_LN2_HIGH = f32(0.693359375)  # 9 significant bits, so that n * _LN2_HIGH is exact
_LN2_LOW = f32(-2.1219444005469057e-4)


@_inline
def exp_float32(x):
    """e**x; error below 1.1 ulp. 0 below -103.98 (through denormals), inf above 88.73, NaN for NaN.

    exp(x) = 2**n * exp(r) with n = round(x / ln 2), |r| <= ln 2 / 2; ln 2 is split in two so that r is exact
    (Cody and Waite 1980). exp(r) is 1 + r + r**2 p(r), p of degree 4, fitted for least relative error (3e-9).
    """
    # Comparisons, not minimum(): a NaN passes through both.
    x = f32(-104.0) if x < f32(-104.0) else x
    x = f32(89.0) if x > f32(89.0) else x
    shifted = x * _LOG2_E + _ROUND
    n = shifted - _ROUND
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = f32(1.38144545e-3) * r + f32(8.36877829e-3)
    p = p * r + f32(4.16683766e-2)
    p = p * r + f32(0.1666652)
    p = p * r + f32(0.49999993)
    return _times_power_of_two((p * (r * r) + r) + f32(1.0), shifted)


@intrinsic
def _power_of_two(typing, shifted):
    """2**n, where n, from -126 to 127, is what was added to 1.5 * 2**23 to give ``shifted``."""

    def codegen(context, builder, signature, args):
        word = ir.IntType(32)
        bits = builder.shl(builder.bitcast(args[0], word), word(23))  # of the sum, n alone stays
        return builder.bitcast(builder.add(bits, word(127 << 23)), ir.FloatType())

    return (types.float32(shifted), codegen) if shifted is types.float32 else None


@_inline
def exp_nonpositive_float32(x):
    """e**x for x <= 0 (and to 88) in fewer operations; error below 1.6 ulp from -20 on, 5 ulp below.

    0 below -87 (no denormals), NaN for NaN. What softmax and every function of e**-|x| needs. As
    ``exp_float32``, but ln 2 is one number (n times it is exact inside a fused multiply-add) and the power of
    two is one factor, whose bits come from the rounding itself.
    """
    shifted = x * _LOG2_E + _ROUND
    r = x - (shifted - _ROUND) * f32(0.6931471805599453)
    p = f32(1.38142251e-3) * r + f32(8.36892426e-3)
    p = p * r + f32(4.16684076e-2)
    p = p * r + f32(0.166665196)
    p = p * r + f32(0.49999994)
    p = p * r + f32(1.0)
    power = _power_of_two(shifted)
    return f32(0.0) if x < f32(-87.0) else power * (p * r) + power


@_inline
def log_float32(x):
    """ln x; error below 1 ulp. -inf for +-0, NaN below 0, inf for inf, NaN for NaN; denormals are exact.

    x = 2**k * m with sqrt(1/2) < m < sqrt(2); ln m from s = (m - 1) / (m + 1) by the series and the order
    of operations of FreeBSD's e_logf.c (Sun Microsystems 1993).
    """
    tiny = x < f32(1.17549435e-38)
    scaled = x * f32(8388608.0) if tiny else x  # denormals become normal
    bits = float_as_bits(scaled) - np.int32(0x3F3504F3)  # so that m starts at sqrt(1/2)
    k = f32(np.int32(bits >> np.int32(23)))
    m = bits_as_float((bits & np.int32(0x007FFFFF)) + np.int32(0x3F3504F3))
    k = k - f32(23.0) if tiny else k
    f = m - f32(1.0)
    s = f / (f32(2.0) + f)
    z = s * s
    w = z * z
    series = z * (f32(0.66666662693) + w * f32(0.28498786688)) + w * (
        f32(0.40000972152) + w * f32(0.24279078841)
    )
    half_square = f32(0.5) * f * f
    result = s * (half_square + series) + k * f32(9.0580006145e-6) - half_square + f + k * f32(0.69313812256)
    result = x if x == f32(np.inf) else result
    result = f32(-np.inf) if x == f32(0.0) else result
    return result if x >= f32(0.0) else f32(np.nan)


@_inline
def tanh_float32(x):
    """tanh x; error below 2 ulp; +-1 at infinity, the sign of zero kept, NaN for NaN.

    Below 0.625: x + x**3 p(x**2), p of degree 4 (4e-9); above: 1 - 2 / (e**(2 |x|) + 1). Both are computed
    and one is chosen, so that there is no branch.
    """
    size = abs(x)
    z = x * x
    p = f32(-5.70498e-3) * z + f32(2.063908e-2)
    p = p * z + f32(-5.373971e-2)
    p = p * z + f32(0.13331442)
    p = p * z + f32(-0.33333282)
    near = x + x * (z * p)
    far = f32(1.0) - f32(2.0) / (exp_float32(f32(2.0) * size) + f32(1.0))
    return copy_sign(near if size < f32(0.625) else far, x)


@_inline
def erf_float32(x):
    """erf x; error below 2 ulp; +-1 at infinity, the sign of zero kept, NaN for NaN.

    Below 0.92: x + x p(x**2), p of degree 5 (1.5e-8); above: 1 - exp(-|x| - q(|x|)), q of degree 6, fitted to
    -ln erfc with the weight that the error has in erf (1.5e-9). erf is 1 in float32 from 3.92 on.
    """
    size = abs(x)
    z = x * x
    p = f32(-5.9994e-4) * z + f32(4.99483e-3)
    p = p * z + f32(-2.676772e-2)
    p = p * z + f32(0.11281846)
    p = p * z + f32(-0.37612496)
    p = p * z + f32(0.12837915)
    near = x + x * p
    t = f32(4.0) if size > f32(4.0) else size
    q = f32(-1.9593826e-4) * t + f32(3.04322676e-3)
    q = q * t + f32(-2.22269552e-2)
    q = q * t + f32(0.103931664)
    q = q * t + f32(0.637182175)
    q = q * t + f32(0.127675666)
    q = q * t + f32(1.95666529e-4)
    far = f32(1.0) - exp_float32(-t - q)
    return copy_sign(near if size < f32(0.92) else far, x)


@_inline
def normal_cdf_float32(x):
    """Probability that a standard normal variable is below x; absolute error below 1.2e-7.

    (1 + erf(x / sqrt 2)) / 2. Not a relative bound: below -5.5 the result is 0. NaN for NaN.
    """
    return f32(0.5) + f32(0.5) * erf_float32(x * f32(0.7071067811865476))


# --- stores past the caches ----------------------------------------------------------------------


@intrinsic
def stream_16(typing, target, source, offset):
    """target[offset:offset+16] = source[offset:offset+16], written past the caches (non-temporal).

    target, source: C-contiguous one-dimensional float32 arrays. The address of ``target[offset]`` must be a
    multiple of 64 bytes (``aligned_empty``; torch's memory is aligned, numpy's is not): at any other address
    the program is killed. Nothing is checked here, where it would cost as much as the store. One store on
    AVX-512, two on AVX, four on SSE and NEON. Call ``store_fence()`` before another thread may read.
    """
    wanted = types.Array(types.float32, 1, "C")
    if (
        target != wanted
        or source not in (wanted, wanted.copy(readonly=True))
        or not isinstance(offset, types.Integer)
    ):
        return None

    def codegen(context, builder, signature, args):
        vector = ir.VectorType(ir.FloatType(), 16).as_pointer()
        pointers = []
        for kind, value in zip(signature.args[:2], args[:2], strict=True):
            data = context.make_array(kind)(context, builder, value).data
            pointers.append(builder.bitcast(builder.gep(data, [args[2]]), vector))
        value = builder.load(pointers[1])
        value.align = 4
        store = builder.store(value, pointers[0])
        store.align = STREAM_BYTES
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(target, source, offset), codegen


@intrinsic
def store_fence(typing):
    """All stores of this thread, streamed ones too, are visible before any that follow."""

    def codegen(context, builder, signature, args):
        if str(builder.module.triple).startswith(("x86_64", "i386", "i686")):
            # An ordinary fence does not order non-temporal stores on x86.
            nothing = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, nothing, "llvm.x86.sse.sfence"), [])
        else:
            builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen
