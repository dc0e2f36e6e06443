"""kernels/inspect.py and kernels/assembly.py: counts, loops, verdicts, and finding a function by name."""

import json
import subprocess
import sys

import numpy as np
import pytest
from numba import njit

from kernels import inspect as inspection
from kernels.assembly import read_assembly
from kernels.inspect import inspect_function, load_function, report
from kernels.simd import host_features

x86_only = pytest.mark.skipif("sse2" not in host_features(), reason="instructions of x86")
PAIR = "float32[::1], float32[::1]"

SOURCE = """
import numba, numpy

@numba.njit
def dot(x, y):
    total = numpy.float32(0)
    for i in range(x.size):
        total += x[i] * y[i]
    return total

@numba.njit("float32(float32[::1], float32[::1])", fastmath=True)
def fast_dot(x, y):
    total = numpy.float32(0)
    for i in range(x.size):
        total += x[i] * y[i]
    return total

class Holder:
    dot = dot

def ordinary(x):
    return x
"""


@pytest.fixture(autouse=True)
def compiled_here(tmp_path, monkeypatch):
    """Not read from what an earlier run has kept."""
    monkeypatch.setenv("PERFLAB_HOME", str(tmp_path / "home"))


@pytest.fixture
def source(tmp_path, monkeypatch):
    path = tmp_path / "inspected_source.py"
    path.write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return path


@x86_only
def test_a_sum_in_order_is_scalar_and_a_reordered_one_packed(source):
    plain, fast = report(f"{source}:dot", PAIR), report(f"{source}:fast_dot")
    assert plain.verdict == "scalar"
    assert plain.packed_arithmetic == plain.packed_fma == plain.vector_bits == 0
    assert plain.scalar_arithmetic >= 2
    assert fast.verdict == f"packed, {fast.vector_bits} bit"
    assert fast.vector_bits >= 128
    if "fma" in host_features():
        assert 0 < fast.packed_fma <= fast.packed_arithmetic
        assert fast.scalar_fma >= 1  # the remainder
    assert "xmm" in fast.registers
    assert fast.float64 == 0


@x86_only
def test_calls_of_libm_are_named_and_keep_a_loop_scalar():
    @njit(error_model="numpy")
    def exponentials(x, y):
        for i in range(x.size):
            y[i] = np.exp(x[i]) + np.tanh(x[i])

    code = inspect_function(exponentials, PAIR)
    assert code.verdict == "scalar, calls expf, tanhf"
    assert set(code.libm) == {"expf", "tanhf"}
    assert "libm expf x" in code.summary


@x86_only
def test_parallel_body_is_read_and_not_the_wrappers():
    from numba import prange

    @njit(error_model="numpy", parallel=True)
    def scale(x, y):
        for i in prange(x.size):
            y[i] = x[i] * x[i]

    code = inspect_function(scale, PAIR)
    assert code.vector_bits >= 128
    assert code.packed_arithmetic >= 1


@x86_only
def test_double_precision_by_accident_is_pointed_out():
    @njit(error_model="numpy")
    def scale(x, y):
        for i in range(x.size):
            y[i] = x[i] / 3.1

    code = inspect_function(scale, PAIR)
    assert code.float64 > 0
    assert "compute in float64" in code.summary


LOOPS = """
	.type	work,@function
work:
	vaddps	%zmm0, %zmm1, %zmm2
	movabsq	$expf, %rbx
.LBB0_1:
	vmulps	%zmm0, %zmm0, %zmm0
	jne	.LBB0_1
.LBB0_2:
	xorl	%eax, %eax
.LBB0_3:
	{inner}
	jne	.LBB0_3
	decq	%rcx
	jne	.LBB0_2
	retq
.Lfunc_end0:
	.size	work, .Lfunc_end0-work
	.type	_ZN7cpythonwork,@function
_ZN7cpythonwork:
	vaddps	%zmm0, %zmm1, %zmm2
	.size	_ZN7cpythonwork, .Lfunc_end1-_ZN7cpythonwork
"""


@pytest.mark.parametrize(
    ("inner", "verdict"),
    [
        ("vfmadd231ss	%xmm0, %xmm1, %xmm2", "scalar"),
        ("vfmadd231ps	%ymm0, %ymm1, %ymm2", "packed, 256 bit"),
        ("callq	*%rbx", "scalar, calls expf"),
        ("incq	%rax", "packed, 512 bit"),  # nothing to decide there: the other loop does
    ],
)
def test_the_deepest_loop_that_computes_decides(inner, verdict):
    code = read_assembly(LOOPS.format(inner=inner), "work", "", "x86_64")
    assert code.verdict == verdict
    assert sorted(loop.depth for loop in code.loops) == [1, 2]
    assert code.packed_arithmetic == 2 + ("ymm" in inner)  # the wrapper's is not counted


def test_a_cpu_that_is_not_known_is_said_to_be_so():
    code = read_assembly(LOOPS, "work", "", "riscv64")
    assert code.verdict == "unknown"
    assert "riscv64" in code.summary
    assert code.packed_arithmetic == 0


def test_result_is_plain_json(source):
    data = json.loads(json.dumps(report("inspected_source:fast_dot").to_json()))
    assert {"verdict", "summary", "vector_bits", "packed_fma", "libm", "loops", "isa", "cpu"} <= set(data)
    assert data["function"] == "fast_dot"


def test_the_caller_s_function_is_left_as_it_was():
    @njit
    def add(x):
        return x + x

    inspect_function(add, "float64")
    assert not add.signatures
    add(1.0)
    assert inspect_function(add).signature == "float64"
    assert len(add.signatures) == 1


@pytest.mark.proof
def test_code_from_numba_s_cache_is_compiled_again(tmp_path):
    (tmp_path / "cached.py").write_text(SOURCE.replace("@numba.njit\n", "@numba.njit(cache=True)\n"))
    program = (
        "import numpy, cached, kernels.inspect as i; x = numpy.ones(9, numpy.float32); cached.dot(x, x);"
        "print(sum(cached.dot.stats.cache_hits.values()), i.inspect_function(cached.dot).scalar_arithmetic)"
    )
    for expected_hits in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=100
        )
        hits, arithmetic = done.stdout.split()
        assert hits == expected_hits
        assert int(arithmetic) > 0 or "sse2" not in host_features()


def test_names_resolve_through_modules_files_and_attributes(source):
    for name in ("inspected_source:dot", "inspected_source.py:Holder.dot", f"{source}:dot"):
        assert load_function(name).py_func.__name__ == "dot"
    assert str(source.parent) not in sys.path


@pytest.mark.parametrize(
    ("name", "signature", "message"),
    [
        ("dot", None, "package.module:name"),
        ("inspected_source:", None, "package.module:name"),
        ("nowhere.py:dot", None, "no file nowhere.py"),
        ("no_such_module_here:dot", None, "cannot be imported"),
        ("inspected_source.py:fast_dott", None, "did you mean 'fast_dot'"),
        ("inspected_source.py:ordinary", None, "numba.njit"),
        ("inspected_source.py:dot", None, "has not been compiled"),
        ("inspected_source.py:dot", "float33[::1]", "no signature of numba types"),
        ("inspected_source.py:dot", "float32[::1]", "cannot be compiled"),
        ("inspected_source.py:dot", "int64, float32[::1]", "cannot be compiled"),
    ],
)
def test_bad_input_says_what_is_wrong(source, name, signature, message):
    with pytest.raises(ValueError, match=message) as caught:
        report(name, signature)
    assert "\n" not in str(caught.value)


def test_a_chunked_body_is_found_with_the_types_of_its_calls():
    import torch

    from kernels.threads import calls_in, chunked

    @chunked
    def scale(chunk, x, factor, again, nothing):
        for i in range(x.size):
            x[i] = x[i] * factor

    x = torch.ones(8)
    expected = "(int64, Array(float32, 1, 'C', False, aligned=True), float64, bool, none)"
    for _ in range(2):
        ((body, (signature,)),) = calls_in(lambda: scale(1, x, 2.0, True, None)).items()
        assert body is scale
        assert str(signature) == expected
        assert signature in scale.signatures
        compiled_calls = dict(scale._workers)
        assert calls_in(lambda: None) == {}
        assert scale._workers == compiled_calls != {}  # what was compiled is kept
    assert torch.equal(x, torch.full((8,), 4.0))
    assert load_function("kernels.activation.cpu_softmax:_forward").py_func.__name__ == "_forward"


def test_several_signatures_are_listed():
    @njit
    def add(x):
        return x + x

    add(1.0)
    add(1)
    with pytest.raises(ValueError, match="float64; int64"):
        inspect_function(add)


def test_what_is_no_numba_function_is_a_type_error():
    with pytest.raises(TypeError, match=r"numba\.njit"):
        inspect_function(len)
    with pytest.raises(TypeError, match="signature string or a tuple"):
        inspect_function(njit(lambda x: x), 3)


def test_importing_the_module_needs_no_numba():
    program = "import sys, kernels.inspect; sys.exit('numba' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
    assert inspection.__doc__
