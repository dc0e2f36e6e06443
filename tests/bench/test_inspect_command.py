"""``perflab inspect``: an operation's bodies on the CPU, what it ships on a GPU that is not there."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.inspection import inspect
from kernels.inspect import inspect_operation

ROOT = Path(__file__).parents[2]
PROMISED = [*(ROOT / "kernels" / "attention").glob("gpu*.py")]


def test_bodies_of_an_operation_on_the_cpu(run, monkeypatch):
    bodies = inspect_operation("softmax")  # compiles them anew, which takes seconds: once
    monkeypatch.setattr("kernels.inspect.inspect_operation", {"softmax": bodies}.__getitem__)
    status, out, err = run("inspect", "softmax")
    assert status == 0, err
    assert all(place.rpartition(":")[2] in out for place in bodies)
    status, out, err = run("inspect", "softmax", "--json")
    assert status == 0, err
    data = json.loads(out)
    assert (data["operation"], data["target"]) == ("softmax", "cpu")
    names = [body["body"].rpartition(":")[2] for body in data["bodies"]]
    assert any("forward" in name for name in names)
    assert any("backward" in name for name in names)
    for body in data["bodies"]:
        assert "float32" in body["signature"]
        assert body["libm"] == {}
        assert {"vector_bits", "packed_fma", "verdict"} <= set(body)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sotfmax"], "did you mean 'softmax'?"),
        (["zebra"], "known are "),
        (["FallbackWarning"], "no operation"),
        (["softmax", "--target", "sm90"], "did you mean 'sm_90'?"),
        (["softmax", "--signature", "float32"], "--signature"),
        (["kernels.simd:exp_float32", "--target", "sm_90"], "--target cpu"),
        (["kernels.simd:nothing"], "kernels.simd has no 'nothing'"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(arguments, message, run):
    status, out, err = run("inspect", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("perflab: ")
    assert err.count("\n") == 1
    assert message in err


# --- GPU targets: sample kernels stand in for a family's ------------------------------------------


@pytest.fixture
def ship(monkeypatch):
    """ship(*compilations) makes them what every operation ships."""
    pytest.importorskip("triton")

    def put(*compilations):
        monkeypatch.setattr("kernels.ahead_of_time.shipped", lambda operation, target: list(compilations))

    return put


def test_configurations_for_a_gpu(ship, capsys):
    import sample_gpu as sample

    ship(sample.norm(4096, 4), replace(sample.product(128, 128, 64, 8), direction="backward"))
    assert inspect("softmax", "sm_90", "", True) == 0
    data = json.loads(capsys.readouterr().out)
    norm, product = data["kernels"]
    assert data["target"] == "sm_90"
    assert data["failures"] == []
    assert norm["spill_bytes"] == product["spill_bytes"] == 0
    assert norm["matrix_instructions"] == 0 < product["matrix_instructions"]
    assert inspect("softmax", "sm_90", "", False) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("layer_norm 4096", "HGMMA", "forward", "backward"))
    assert max(map(len, shown.splitlines())) <= 100


def test_a_broken_promise_or_a_failure_is_status_1(ship, capsys):
    import sample_gpu as sample

    ship(replace(sample.norm(4096, 4), matrix=True))
    assert inspect("softmax", "sm_90", "", False) == 1
    assert "layer_norm 4096 forward: no matrix instructions" in capsys.readouterr().out
    ship(replace(sample.norm(4096, 4), constants={"BLOCK": 100}))
    assert inspect("softmax", "sm_90", "", True) == 1
    (failure,) = json.loads(capsys.readouterr().out)["failures"]
    assert "does not compile" in failure
    assert "power of 2" in failure


def test_nothing_shipped_is_said(ship):
    ship()
    with pytest.raises(ValueError, match="softmax ships no Triton kernel for gfx942"):
        inspect("softmax", "gfx942", "", False)


@pytest.mark.timeout(600)
@pytest.mark.skipif(not PROMISED, reason="attention has no Triton kernels yet")
def test_attention_on_hopper_spills_nothing_and_uses_matrix_instructions(compiling_alone, capsys):
    pytest.importorskip("triton")
    assert inspect("scaled_dot_product_attention", "sm_90", "", True) == 0
    codes = json.loads(capsys.readouterr().out)["kernels"]
    assert {code["direction"] for code in codes} == {"forward", "backward"}
    assert all(code["spill_bytes"] == 0 for code in codes)
    assert all(
        any(code["matrix_instructions"] for code in codes if code["direction"] == direction)
        for direction in ("forward", "backward")
    )
