"""The pipeline lab: predictions by hand, the same results on real ranks, figures."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
from kept import Kept
from pipeline_results import LAB, QUICK, Predicted, as_predicted, constants
from stated import Stated

from labs import figure as figures
from labs.lab import configure, find
from labs.pipeline import lost_time, model, running, simulated, stage_times
from labs.pipeline.config import MODELS, SCHEDULES, Config
from labs.pipeline.running import VIRTUAL

TINY = Config(microbatches=3, ranks=3, unit_ms=0.5, width=32, layers=4, length=8, sequences=1)


# --- on real ranks ---------------------------------------------------------------------------------


def run_all(addresses, config):
    found = {}
    for address in addresses:
        recorder = Kept()
        step = find(LAB, config, address).setup(config, recorder)
        output = step()
        step.close()
        found[address] = output, recorder.values
    return found


def addresses(config, *groups):
    return [variant.address for variant in LAB.variants(config) if variant.group in groups]


@pytest.fixture(scope="module")
def real(ranks):
    return ranks.run(2, run_all, addresses(TINY, stage_times.GROUP, *MODELS), TINY)[0]


@pytest.fixture(scope="module")
def virtual(ranks):
    return ranks.run(3, run_all, addresses(TINY, VIRTUAL), TINY)[0]


def test_every_schedule_computes_what_one_process_does(real, virtual):
    outputs = {address: output for address, (output, _) in {**real, **virtual}.items()}
    checks = LAB.check(TINY, outputs)
    assert len(checks) == 2 + 3 * len(SCHEDULES)
    assert [check for check in checks if not check.passed] == []
    for address, output in outputs.items():
        wrong = output.clone()
        wrong[-1] += 1e-3
        assert not LAB.check(TINY, {address: wrong})[0].passed, address
    with pytest.raises(TypeError, match="returned no vector of"):
        LAB.check(TINY, {"gpt/1f1b": outputs["gpt/1f1b"][:-1]})


def test_a_proof_is_small_and_every_gradient_has_a_part_in_it():
    """A large model's too: an answer of a rank has room for 8 MB."""
    import torch

    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2000, 1000), (3,), (1,))]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    losses = torch.ones(8, dtype=torch.float64)
    proof = running.proof_of(losses, weights)
    assert len(proof) < 2 * running.PROOF_NUMBERS
    for weight in weights:
        weight.grad.view(-1)[-1] = 0.5  # of the first, none of those that are shown
        other = running.proof_of(losses, weights)
        assert float((other - proof).abs().max()) == 0.5
        weight.grad.zero_()


def test_activations_are_counted_as_predicted(real, virtual):
    counted = {address: values for address, (_, values) in {**real, **virtual}.items()}
    exact = [each for each in LAB.predict(TINY, constants()) if each.exact]
    assert len(exact) == 3 * len(SCHEDULES)
    for each in exact:
        assert counted[each.variant][each.key] == [each.value], each


def test_bytes_held_follow_the_activations(real):
    """GPipe holds three micro-batches, 1F1B two on its first rank: by what is predicted, and more where
    gradients of the micro-batch under way are larger than what is kept."""
    for group in MODELS:
        held = {name: real[f"{group}/{name}"][1]["held_B"][-1] for name in ("gpipe", "1f1b")}
        assert held["1f1b"] < held["gpipe"]


def test_recorded_times_are_the_schedules(virtual):
    """Each action takes at least its set time, and begins when what it needs is there."""
    for name in SCHEDULES:
        schedule, values = TINY.schedule_of(name, 3), virtual[f"{VIRTUAL}/{name}"][1]
        unit = simulated.virtual_unit(TINY, schedule)
        spans = []
        for rank in range(3):
            edges = (values[f"rank{rank}_{edge}_s"] for edge in ("begin", "end"))
            spans.append(list(zip(*edges, strict=True)))
            assert len(spans[-1]) == len(schedule.ranks[rank])
            assert all(end - begin >= unit for begin, end in spans[-1])
        lost = lost_time.Stamps(spans).lost(schedule)
        assert values["bubble_ratio"] == [pytest.approx(lost.bubble, abs=1e-9)]
        assert values["overhead_s"] == [pytest.approx(lost.overhead, abs=1e-9)]


def test_stage_times_are_recorded_of_each_stage_and_kind(real):
    for group in MODELS:
        values = real[f"{stage_times.GROUP}/{group}"][1]
        expected = {
            f"{stage_times.key(count, stage, kind)}_s"
            for count in (2, 4)
            for stage in range(count)
            for kind in stage_times.KINDS
        }
        assert set(values) == expected
        assert all(seconds > 0 for row in values.values() for seconds in row)


# --- predictions -----------------------------------------------------------------------------------


def test_every_variant_is_predicted_with_its_numbers_and_a_suspect():
    found = LAB.predict(QUICK, constants())
    assert {v.address for v in LAB.variants(QUICK)} == {each.variant for each in found} - {""}
    for each in found:
        assert each.because
        assert each.suspect
        assert each.value > 0
    for group in (*MODELS, VIRTUAL):
        keys = {each.key for each in found if each.variant == f"{group}/zb_v"}
        assert keys == {"time_s", "bubble_ratio", "overhead_s", "in_flight"} | (
            set() if group == VIRTUAL else {"held_B"}
        )


def free():
    """A machine whose calls and messages cost nothing."""
    stated = constants()
    return replace(
        stated,
        constants={**stated.constants, "torch_call_s": 0.0, "gloo_message_s": 0.0, "gloo_s_per_byte": 0.0},
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_overhead_virtual_devices_are_the_closed_form(name):
    """(m + p - 1) or fewer times what a rank computes for one micro-batch."""
    from parallel import schedules

    bubble = schedules.bubble(name, QUICK.ranks, QUICK.microbatches)
    said = {
        each.key: each.value for each in LAB.predict(QUICK, free()) if each.variant == f"{VIRTUAL}/{name}"
    }
    busy = 3 * QUICK.microbatches * QUICK.unit_ms / 1e3
    assert said["bubble_ratio"] == pytest.approx(bubble)
    assert said["time_s"] == pytest.approx(busy / (1 - bubble))
    assert said["overhead_s"] == pytest.approx(0, abs=1e-12)


def test_stages_are_the_model():
    """However it is cut, the stages have all of its FLOPs and all that it keeps, and each kind of block its
    own: a decoder block has more of both."""
    from labs.models import formulas
    from labs.pipeline import real_stages

    for group in MODELS:
        whole, *cuts = (model.stage_parts(QUICK, group, count) for count in (1, 2, 3, 4))
        for cut in cuts:
            for name in ("flops", "kept"):
                assert sum(getattr(part, name) for part in cut) == pytest.approx(getattr(whole[0], name))
    gpt = real_stages.configuration(QUICK, "gpt")
    assert model.stage_parts(QUICK, "gpt", 1)[0].kept == formulas.activation_bytes(gpt, 2, 64)
    assert model.stage_parts(QUICK, "gpt", 1)[0].flops == 2 * 64 * formulas.flops_per_token(gpt, 64, False)
    blocks, _ = model.parts(QUICK, "encoder_decoder")
    assert blocks[-1].flops > blocks[0].flops
    assert blocks[-1].kept > blocks[0].kept


def test_ranks_that_share_a_core_take_longer():
    crowded = replace(QUICK, stages=4)
    one, other = (model.stage_durations(config, constants(), "gpt", 4) for config in (QUICK, crowded))
    assert other.forward == pytest.approx([2 * seconds for seconds in one.forward])


def test_lost_time_by_hand():
    """Two ranks, one micro-batch: rank 1 begins a second after it could, rank 0 half a second."""
    schedule = replace(TINY, microbatches=1).schedule_of("1f1b", 2)
    stamps = lost_time.Stamps([[(10.0, 12.0), (19.5, 20.0)], [(13.0, 15.0), (15.0, 19.0)]])
    assert stamps.step == 10.0
    lost = stamps.lost(schedule)
    assert lost.overhead == pytest.approx((0.5 + 1.0) / 4)
    assert lost.bubble == pytest.approx((7.0 + 2.0 + 1.0) / 20)


def test_one_schedule_from_a_file(tmp_path):
    """It runs where it fits, under its own name, with its own number of micro-batches."""
    file = tmp_path / "mine.txt"
    file.write_text("name mine\nplacement 0 1\n0: 0F0 0F1 0B0 0B1\n1: 1F0 1B0 1F1 1B1\n")
    config = configure(LAB, "quick", {"schedule": str(file)})
    assert [v.address for v in LAB.variants(config)] == [
        "stage_times/gpt", "stage_times/encoder_decoder", "gpt/mine", "encoder_decoder/mine"
    ]  # fmt: skip
    assert config.schedule_of("mine", 2).microbatches == 2
    assert [each.variant for each in LAB.predict(config, constants()) if each.exact] == [
        "gpt/mine",
        "encoder_decoder/mine",
    ]


def test_a_schedule_by_name_is_run_alone():
    config = configure(LAB, "quick", {"schedule": "1f1b"})
    assert {v.name for v in LAB.variants(config)} == {*MODELS, "1f1b"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 48}, "width=48 is no multiple of 32"),
        ({"layers": 3}, "layers=3 are fewer than the 4 stages that schedules with two stages on each of 2"),
        ({"microbatches": 0}, "microbatches=0 is below the minimum of 1"),
        ({"schedule": "1f1c"}, "schedule='1f1c' is no schedule and no file; did you mean '1f1b'"),
        ({"stages": 1}, "stages=1 is below the minimum of 2"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        configure(LAB, "quick", settings)


def test_a_file_with_an_error_or_for_other_ranks_is_refused(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("placement 0\n0: 0F0 0G0\n")
    with pytest.raises(ValueError, match="line 2: '0G0' is no action"):
        configure(LAB, "quick", {"schedule": str(file)})
    file.write_text("placement 0 1 2\n0: 0F0 0B0\n1: 1F0 1B0\n2: 2F0 2B0\n")
    with pytest.raises(ValueError, match=r"is for 3 ranks; there are 2 \(stages\) and 4 virtual ones"):
        configure(LAB, "quick", {"schedule": str(file)})


# --- figures ----------------------------------------------------------------------------------------


def test_figures_draw_what_was_predicted_above_what_was_measured(virtual):
    config = TINY
    recorded = {
        (address, key): values for address, (_, found) in virtual.items() for key, values in found.items()
    }

    results = as_predicted(config)
    drawn = LAB.figure(Predicted(config, results.machine, results.columns, values=recorded))
    timelines = [each for each in drawn if isinstance(each, figures.Timeline)]
    assert [each.title.partition(":")[0] for each in timelines] == [
        "1f1b",
        "interleaved_1f1b",
        "zb_v",
        "v_half",
    ]
    for each in timelines:
        names = [name for name, _ in each.rows]
        assert names == [f"{kind}, rank {rank}" for kind in ("predicted", "measured") for rank in range(3)]
        assert "Virtual devices" in each.note
        for (_, said), (_, measured) in zip(each.rows[:3], each.rows[3:], strict=True):
            assert [span.label for span in said] == [span.label for span in measured]
    for each in drawn:
        again = figures.to_json(figures.from_json(json.loads(json.dumps(figures.to_json(each)))))
        assert json.dumps(again) == json.dumps(figures.to_json(each))
    assert "virtual devices" in next(each for each in drawn if each.title.startswith("Virtual")).note
    assert LAB.figure(Stated(QUICK, constants(), {})) == []


def test_names_are_those_of_parallel():
    from parallel import schedules

    assert SCHEDULES == schedules.NAMES
    assert math.isfinite(LAB.memory_bytes(QUICK))
    assert running.VIRTUAL in {v.group for v in LAB.variants(QUICK)}


def test_importing_the_lab_loads_no_heavy_package():
    code = (
        "import sys; from labs import load; from labs.lab import configure; lab = load('pipeline');"
        "configure(lab, 'quick'); lab.variants(configure(lab, 'quick'));"
        "print([name for name in ('torch', 'numpy', 'numba', 'jax') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.strip() == "[]"
