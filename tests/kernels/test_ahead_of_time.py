"""Every shipped configuration, compiled without a GPU: no spills, the promised instructions, 16-byte loads.

For Hopper a sample in which every kernel and setting occurs; under ``make proof`` all of them, for every
target, and with Triton 3.6 (the oldest known) and 3.9 (the newest). What was compiled stays in pytest's cache
folder (``home`` in conftest.py).
"""

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from kernels.interpreter import interpreting
from kernels.spec import FAMILIES

pytest.importorskip("triton")
if interpreting():
    pytest.skip("TRITON_INTERPRET=1: nothing compiles", allow_module_level=True)

import sample_gpu as sample
from families import has_triton_kernels

from kernels.ahead_of_time import TARGETS, Compilation, MachineCode, compile_all, compile_for, shipped
from kernels.machine_code import facts_of

ROOT = Path(__file__).parents[2]


# --- the shipped configurations ------------------------------------------------------------------


def traits(item):
    """{(what is set, value)}: the operation, and each setting of the kernel's text, of which several
    operations may be made."""
    text = f"{item.kernel.fn.__module__}.{item.kernel.fn.__qualname__}"
    settings = {**item.types, **item.constants, **item.options}
    return {("operation", item.operation), *((f"{text} {name}", value) for name, value in settings.items())}


def wanted_of(items):
    """The traits that a sample must have: of numbers the least and the greatest, of all else every one."""
    values = defaultdict(set)
    for place, value in set().union(*map(traits, items)):
        values[place].add(value)
    for found in values.values():
        if all(type(value) is int for value in found):
            found.intersection_update({min(found), max(found)})
    return {(place, value) for place, found in values.items() for value in found}


def sample_of(items):
    """Few of the compilations that have what is wanted of all of them: always the one that adds most."""
    chosen, missing = [], wanted_of(items)
    while missing:
        chosen.append(max(items, key=lambda item: len(traits(item) & missing)))
        missing -= traits(chosen[-1])
    return chosen


def broken(family, target, whole=True):
    """The configurations of a family that do not keep their promises, with what breaks them."""
    prefix = f"kernels.{family}."
    chosen = [item for item in shipped(target=target) if item.kernel.fn.__module__.startswith(prefix)]
    chosen = chosen if whole else sample_of(chosen)
    if not chosen and not has_triton_kernels(family):
        pytest.skip(f"kernels/{family} has no Triton kernels yet")
    assert chosen or target != "sm_90", f"no gpu*.py of kernels/{family} says in compilations() what it ships"
    found = []
    for compilation, outcome in compile_all(chosen, target):
        if isinstance(outcome, MachineCode):
            found += [f"{outcome.summary}: {', '.join(outcome.problems)}"] if outcome.problems else []
        else:
            found.append(f"{compilation.label}: {outcome}")
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_of_what_is_shipped_keeps_its_promises_on_hopper(family, compiling_alone):
    assert not (found := broken(family, "sm_90", whole=False)), "\n".join(found)


@pytest.mark.proof
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_shipped_configurations_keep_their_promises(family, target):
    assert not (found := broken(family, target)), "\n".join(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_has_every_kernel_and_operation_and_the_ends_of_every_setting(family):
    items = [item for item in shipped() if item.kernel.fn.__module__.startswith(f"kernels.{family}.")]
    chosen = sample_of(items)
    assert len({(item.operation, item.direction, item.label) for item in chosen}) == len(chosen)
    assert {item.operation for item in chosen} == {item.operation for item in items}
    for item in items:
        both = [
            [one for one in group if one.kernel.fn.__qualname__ == item.kernel.fn.__qualname__]
            for group in (chosen, items)
        ]
        for name in item.constants:
            mine, every = ([one.constants[name] for one in group if name in one.constants] for group in both)
            if all(type(value) is int for value in every):
                assert (min(mine), max(mine)) == (min(every), max(every)), (item.label, name)
            else:
                assert set(mine) == set(every), (item.label, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_and_operations_are_known(family):
    import kernels

    items = [item for item in shipped() if item.kernel.fn.__module__.startswith(f"kernels.{family}.")]
    labels = [(item.operation, item.direction, item.label) for item in items]
    assert len(labels) == len(set(labels))
    assert {item.operation for item in items} <= set(kernels.__all__)


@pytest.mark.proof
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("version", ["3.6.0", "3.9.0"])
def test_shipped_configurations_keep_their_promises_with_another_triton(version, tmp_path):
    wheel = tmp_path / "triton"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", wheel]
    done = subprocess.run([*command, f"triton=={version}"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"triton {version} cannot be had here: {done.stderr.strip().splitlines()[-1]}")
    try:
        check = f"import triton; assert triton.__version__ == {version!r}, triton.__file__"
        tests = [
            "-m",
            "pytest",
            "-q",
            "-rs",
            "--timeout=600",  # each compiles everything anew
            __file__,
            "-k",
            "sm_90 or sample",
        ]
        environment = {**os.environ, "PYTHONPATH": f"{wheel}{os.pathsep}{ROOT}"}
        for arguments in (["-c", check], tests):
            done = subprocess.run(
                [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    finally:
        shutil.rmtree(wheel)  # half a gigabyte


# --- what is read from machine code --------------------------------------------------------------

NORM = sample.norm(4096, 4)
PRODUCT = sample.product(128, 128, 64, 8)
ROLES = sample.product(128, 128, 64, 4, kernel=sample.matmul_with_roles, specialized=True)


@pytest.mark.parametrize("target", TARGETS)
def test_sample_norm(target):
    code = compile_for(NORM, target)
    assert code.problems == ()
    assert 0 < code.registers <= 72
    assert code.spill_bytes == 0
    assert code.loads == code.wide_loads > 0
    assert code.stores == code.wide_stores > 0
    assert code.matrix_instructions == 0
    assert code.blocks >= 6
    assert code.fits
    assert not code.specialized
    assert 100 < code.instructions < 1000


@pytest.mark.parametrize(
    ("target", "kind"),
    [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA"), ("gfx942", "MFMA")],
)
def test_sample_product(target, kind):
    code = compile_for(PRODUCT, target)
    assert code.problems == ()
    assert any(found.startswith(kind) for found in code.matrix_kinds), code.matrix_kinds
    assert code.matrix_instructions > 0
    assert (code.async_copies > 0) == target.startswith("sm")
    assert (code.tensor_memory_columns > 0) == (target == "sm_100")
    assert code.shared_bytes >= 32 * 1024


def test_sample_of_warps_with_roles():
    four = compile_for(ROLES, "sm_90")
    assert four.problems == ()
    assert four.specialized
    assert four.warps == 12
    assert four.tma > 0
    eight = compile_for(replace(ROLES, options={"num_warps": 8, "num_stages": 3}), "sm_90")
    assert not eight.specialized
    assert eight.problems == ("not specialised",)


@pytest.mark.parametrize(
    ("compilation", "target", "problem"),
    [
        (sample.product(128, 256, 64, 4), "sm_90", "bytes spilled"),
        (sample.product(128, 128, 128, 8, options={"num_warps": 8, "num_stages": 4}), "sm_90", "launched"),
        (replace(NORM, matrix=True), "sm_90", "no matrix instructions"),
        (
            replace(NORM, types={k: v.rstrip("!") for k, v in NORM.types.items()}),
            "sm_90",
            "no load of 16 bytes",
        ),
    ],
)
def test_sample_that_breaks_a_promise_is_seen(compilation, target, problem):
    code = compile_for(compilation, target)
    assert len(code.problems) == 1
    assert problem in code.problems[0]


def test_what_was_read_is_plain_json_and_one_line():
    code = compile_for(PRODUCT, "sm_90")
    data = json.loads(json.dumps(code.to_json()))
    assert data["label"] == "matmul 128x128x64"
    assert {"registers", "spill_bytes", "shared_bytes", "occupancy", "matrix_instructions"} <= set(data)
    assert "\n" not in code.summary
    assert "HGMMA" in code.summary


def test_occupancy_follows_from_the_scarcest():
    counts = {"registers": 56, "tensor_memory_columns": 0}
    assert facts_of("sm_90", 4, 0, counts)["blocks"] == 9
    assert facts_of("sm_90", 4, 0, counts)["occupancy"] == 36 / 64
    assert facts_of("sm_90", 4, 100 * 1024, counts)["limited_by"] == "shared memory"
    assert facts_of("sm_90", 4, 227 * 1024, counts)["fits"]
    assert not facts_of("sm_90", 4, 227 * 1024 + 16, counts)["fits"]
    assert facts_of("sm_90", 16, 0, counts | {"registers": 24})["limited_by"] == "warps"
    assert facts_of("sm_90", 1, 0, counts | {"registers": 16})["limited_by"] == "blocks"
    assert facts_of("sm_100", 4, 0, counts | {"tensor_memory_columns": 256})["blocks"] == 2
    assert facts_of("gfx942", 8, 0, counts | {"registers": 256})["blocks"] == 1
    assert not facts_of("gfx942", 8, 65 * 1024, counts)["fits"]


def test_wrong_input_says_what_would_be_right():
    with pytest.raises(ValueError, match="did you mean sm_90"):
        compile_for(NORM, "sm90")
    with pytest.raises(ValueError, match="missing arguments of layer_norm: eps"):
        compile_for(replace(NORM, types={k: v for k, v in NORM.types.items() if k != "eps"}), "sm_90")
    with pytest.raises(ValueError, match="unknown arguments of layer_norm: BLOK"):
        compile_for(replace(NORM, constants={"BLOCK": 64, "BLOK": 64}), "sm_90")
    with pytest.raises(ValueError, match="both typed and constant"):
        compile_for(replace(NORM, constants={"BLOCK": 64, "eps": 1e-5}), "sm_90")
    with pytest.raises(RuntimeError, match="layer_norm 4096 does not compile for sm_90"):
        compile_for(replace(NORM, constants={"BLOCK": 100}), "sm_90")
    with pytest.raises(ValueError, match="forward or backward"):
        sample.norm(64, 1, direction="both")
    with pytest.raises(ValueError, match="targets are"):
        Compilation("x", sample.layer_norm, {}, {}, {}, "x", "forward", targets=("sm_70",))
