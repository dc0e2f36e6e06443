"""labs/vectorization: every rung computes the same, predictions are complete, claims can be refuted."""

import json
import math
import subprocess
import sys
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from labs.figure import to_json
from labs.lab import Interval, NotMeasured, configure
from labs.machine import MMAP_THRESHOLD_BYTES, Curve, Machine
from labs.vectorization import LAB, PROBLEMS, rungs

SMALL = dict(points=37, dimensions=19, options=1001, pixels=70, iterations=50, nodes=33)
WITHOUT_COMPILER = {"compile": False}  # torch.compile takes 20 s here; every run of the lab proves its result
CONSTANTS = dict(
    cores=4,
    vector_float32_1_flops=1e11,
    vector_float32_all_flops=4e11,
    vector_lanes_float32=16,
    scalar_float32_flops=1.4e10,
    fma_latency_s=1e-9,
    add_latency_s=0.6e-9,
    packed_exp_s=2e-10,
    packed_division_s=3e-10,
    python_operation_s=1.3e-8,
    python_call_s=3e-8,
    python_item_s=7e-9,
    python_step_s=8e-9,
    python_function_s=2e-8,
    libm_exp_s=4e-9,
    numpy_exp_s=5e-10,
    numpy_call_s=7e-7,
    numpy_conversion_s=1e-9,
    numpy_broadcast_row_s=5e-8,
    numba_call_s=2e-7,
    numba_parallel_region_s=3e-6,
    torch_call_s=2e-6,
    torch_parallel_region_s=2e-6,
    jax_call_s=1e-5,
    page_fault_s_per_byte=5e-10,
)


def machine(**changed):
    curves = {
        name: Curve([1e4, 1e6, 1e8], [scale * rate for rate in (1e11, 8e10, 2e10)])
        for name, scale in (("copy_1", 1), ("copy_all", 2), ("read_1", 1), ("read_all", 2))
    }
    return Machine("example", True, CONSTANTS | changed, curves)


@dataclass
class Notes:
    """A recorder that keeps what it is told."""

    values: dict = field(default_factory=dict)

    def now(self):
        return 0.0

    def record(self, name, value, unit):
        assert unit
        self.values.setdefault(name, []).append(value)


@pytest.fixture(scope="module")
def config():
    return configure(LAB, "quick", SMALL | WITHOUT_COMPILER)


@pytest.fixture(scope="module")
def climbed(config):
    """Outputs and notes of every rung that runs here, at a small size."""
    outputs, notes = {}, {}
    for variant in LAB.variants(config):
        if not variant.unavailable:
            notes[variant.address] = Notes()
            step = variant.setup(config, notes[variant.address])
            outputs[variant.address] = step()
            if hasattr(step, "close"):
                step.close()  # records what the compiler made
    return outputs, notes


def test_every_rung_computes_the_same(config, climbed):
    outputs, _ = climbed
    checks = {check.variant: check for check in LAB.check(config, outputs)}
    assert set(checks) == set(outputs)
    assert len(checks) >= 28
    for check in checks.values():
        assert check.passed, check


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.GROUP)
def test_check_finds_a_wrong_number_a_nan_and_a_wrong_shape(config, climbed, problem):
    right = np.asarray(climbed[0][f"{problem.GROUP}/numpy"])
    off, poisoned = right.copy(), right.astype(np.float64)
    off[: max(1, len(off) // 8)] += 1
    poisoned[0, 0] = math.nan
    wrong = {"off": off, "poisoned": poisoned, "cut": right[:-1]}
    if problem.GROUP == "mandelbrot":  # a pixel of counts may differ: near the boundary all is rounding
        wrong["poisoned"] = np.full_like(poisoned, math.nan)
    for name, values in wrong.items():
        address = f"{problem.GROUP}/{name}"
        (check,) = LAB.check(config, {address: values})
        assert check.variant == address
        assert not check.passed
    assert LAB.check(config, {f"{problem.GROUP}/right": right})[0].passed


def test_a_square_distance_may_not_be_checked_by_a_shape_alone(config, climbed):
    """The diagonal is exactly zero where differences are taken, and nearly so by the Gram form."""
    for name in ("python", "numpy", "numba", "numba_simd"):
        assert np.all(np.diag(np.asarray(climbed[0][f"pairwise/{name}"])) == 0)


def test_notes_say_what_the_compiler_made(climbed):
    from kernels import simd
    from kernels.inspect import inspect_function
    from labs.vectorization import pairwise_numba

    if inspect_function(pairwise_numba.plain, "float32[:, ::1]").verdict == "unknown":
        pytest.skip("this CPU's instructions are not known")
    notes = {address: kept.values for address, kept in climbed[1].items()}
    for group in ("pairwise", "black_scholes", "mandelbrot"):
        assert notes[f"{group}/numba"]["vector_bits"] == [0]
    for group in ("pairwise", "black_scholes", "mandelbrot", "floyd_warshall"):
        assert notes[f"{group}/numba_simd"]["vector_bits"] == [simd.vector_bits()], "as wide as there are"
        assert notes[f"{group}/numba_simd"]["libm_calls"] == [0]
    assert notes["black_scholes/numba"]["libm_calls"][0] >= 4


def test_predictions_are_times_of_known_variants(config):
    known = {variant.address for variant in LAB.variants(config)}
    found = LAB.predict(config, machine())
    assert len(found) >= 20
    assert len({item.variant for item in found}) == len(found)
    for item in found:
        assert item.variant in known
        assert item.key == "time_s"
        assert 0 < item.value < 100
        assert any(letter.isdigit() for letter in item.because)
        assert item.suspect


@pytest.mark.parametrize(
    ("constants", "variant"),
    [
        (["python_operation_s", "python_step_s"], "mandelbrot/python"),
        (["add_latency_s"], "pairwise/numba"),
        (["add_latency_s", "fma_latency_s"], "mandelbrot/numba"),
        (["packed_exp_s", "fma_latency_s"], "mandelbrot/numba_simd"),
        (["libm_exp_s", "fma_latency_s"], "black_scholes/numba"),
    ],
)
def test_a_time_follows_the_constants_of_its_mechanism(config, constants, variant):
    def predicted(on):
        return {item.variant: item.value for item in LAB.predict(config, on)}[variant]

    slower = machine(**{constant: 2 * CONSTANTS[constant] for constant in constants})
    assert predicted(slower) == pytest.approx(2 * predicted(machine()))


def test_cores_divide_what_is_parallel_only(config):
    one, four = (
        {item.variant: item.value for item in LAB.predict(config, machine(cores=cores))} for cores in (1, 4)
    )
    for group in ("pairwise", "black_scholes", "mandelbrot"):
        assert four[f"{group}/numba_parallel"] < one[f"{group}/numba_parallel"]
        assert four[f"{group}/numba_simd"] == one[f"{group}/numba_simd"]


def test_new_pages_are_paid_for_large_blocks_under_the_default_allocator_only():
    large = configure(LAB, "quick")

    def numpy_time(on):
        return {item.variant: item.value for item in LAB.predict(large, on)}["pairwise/numpy"]

    cube = 4.0 * large.points**2 * large.dimensions
    assert cube > MMAP_THRESHOLD_BYTES
    extra = numpy_time(machine()) - numpy_time(machine().with_allocator("tuned"))
    assert extra == pytest.approx(2 * cube * CONSTANTS["page_fault_s_per_byte"])
    assert rungs.fresh_seconds(machine(), MMAP_THRESHOLD_BYTES - 1) == 0


def test_every_claim_can_hold_fail_and_be_undecided(config):
    for claim in LAB.claims:
        assert claim.holds(Example(config, fast=0.01)) is True, claim.text
        assert claim.holds(Example(config, fast=0.9)) is False, claim.text
        assert claim.holds(Example(config, fast=0.01, spread=1000)) is None, claim.text
        assert claim.holds(Example(config, fast=0.01, only=())) is None, claim.text


def test_a_claim_about_code_fails_when_the_code_is_otherwise(config):
    scalar = [claim for claim in LAB.claims if claim.holds(Example(config, fast=0.01, bits=0)) is False]
    calling = [claim for claim in LAB.claims if claim.holds(Example(config, fast=0.01, calls=4)) is False]
    assert len(scalar) == len(calling) == 1
    assert "reorder" in scalar[0].text
    assert "C library" in calling[0].text


def test_figures_carry_every_number_and_survive_missing_rungs(config):
    drawn = LAB.figure(Example(config, fast=0.5))
    assert len(drawn) == len(PROBLEMS) + 2
    for picture in drawn:
        for values in picture.series.values():
            assert len(values) == len(picture.labels)
        json.dumps(to_json(picture))
    speed = drawn[0]
    assert speed.series["measured"][speed.labels.index("numpy")] == 1
    assert LAB.figure(Example(config, fast=0.5, only=())) == []


def test_claims_and_figures_need_no_heavy_package():
    program = (
        "import sys; from labs.vectorization import LAB; from labs.lab import configure;"
        "LAB.variants(configure(LAB, 'quick'));"
        "sys.exit(','.join({'torch', 'jax', 'numba'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [item for item in SMALL])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}=0 is below the minimum of 1"):
        configure(LAB, "quick", {name: 0})


def test_smallest_sizes_work():
    tiny = configure(LAB, "quick", dict.fromkeys(SMALL, 1))
    assert all(item.value > 0 for item in LAB.predict(tiny, machine()))
    for group in ("pairwise", "black_scholes", "mandelbrot", "floyd_warshall"):
        outputs = {
            variant.address: variant.setup(tiny, Notes())()
            for variant in LAB.variants(tiny)
            if variant.group == group and variant.name in ("python", "numpy", "numba_simd", "numpy_compact")
        }
        assert all(check.passed for check in LAB.check(tiny, outputs))


def test_memory_grows_with_every_size(config):
    assert LAB.memory_bytes(configure(LAB, "full")) > LAB.memory_bytes(config)
    for name, size in dict(points=40_000, options=10**9, pixels=10**5, nodes=10**5).items():
        assert LAB.memory_bytes(replace(config, **{name: size})) > 64e9


class Example:
    """Results as the runner gives them, made up: rungs that claims call fast take ``fast`` of the rest."""

    FAST = ("numba_simd", "numpy_gram")

    def __init__(self, config, fast, spread=1.0, bits=512, calls=0, only=None):
        self.config, self.machine = config, machine()
        self.fast, self.spread, self.bits, self.calls = fast, spread, bits, calls
        self.addresses = [
            variant.address for variant in LAB.variants(config) if only is None or variant.address in only
        ]

    def variants(self, group=None):
        return [address for address in self.addresses if group in (None, address.partition("/")[0])]

    def has(self, *variants):
        return set(variants) <= set(self.addresses)

    def seconds(self, variant):
        group, _, name = variant.partition("/")
        value = {"python": 1.0, "numba": 1.0, "numpy": 1.0}.get(name, 1.0)
        if name in self.FAST:
            value = self.fast
        elif (group, name) in (("mandelbrot", "numba"), ("black_scholes", "numpy")):
            value = math.sqrt(self.fast)  # between Python and SIMD
        return Interval(value, value / self.spread, value * self.spread)

    def ratio(self, new, base):
        value = self.seconds(new).value / self.seconds(base).value
        return Interval(value, value / self.spread, value * self.spread)

    def recorded(self, variant, name):
        group, _, rung = variant.partition("/")
        if rung not in ("numba", "numba_simd"):  # as of real results
            raise NotMeasured(f"{variant} recorded no {name!r}")
        if name == "vector_bits":
            return [self.bits if rung == "numba_simd" else 0]
        if name == "libm_calls":
            return [self.calls if rung == "numba_simd" else 4 * (group == "black_scholes")]
        return [1]

    def predicted(self, variant, key="time_s"):
        found = {item.variant: item.value for item in LAB.predict(self.config, self.machine)}
        return found.get(variant)
