"""A variant that asks for it is profiled after its rounds; what is said of the report enters its results."""

import json
import time

import pytest

from bench.diagnosis.facts import Facts
from bench.diagnosis.verdict import decide
from bench.measure import measure_group
from bench.profile.recorders import TorchRecorder
from bench.profile.steps import record
from bench.traces.load import load
from bench.traces.steps import steps
from labs.lab import Check, Lab, Variant


def adds(seconds):
    """A setup whose step adds tensors and then does without torch for so long."""

    def setup(config, recorder):
        import torch

        tensor = torch.ones(4_000_000)  # milliseconds, beside which what the profiler costs is little

        def step():
            tensor.add(1.0)
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                pass
            return 1.0

        return step

    return setup


def lab(**profiled):
    variants = [
        Variant("group", name, adds(0.01 if name == "slow" else 0.0), profiled=steps)
        for name, steps in profiled.items()
    ]
    return Lab(
        *("mine", "?", "!", dict),
        variants=lambda config: variants,
        check=lambda config, outputs: [Check(name, 0.0, 0.0, "nothing") for name in outputs],
    )


@pytest.mark.alone
def test_the_diagnosis_and_the_difference_to_the_first_enter_the_results():
    result = measure_group(lab(slow=3, fast=3, plain=0), {}, "group", budget_seconds=0.2)
    assert not result.errors
    slow, fast, plain = (measured.extra_info for measured in result.measured)
    assert slow["diagnosis"]["bottleneck"] == "python"
    assert slow["diagnosis"]["facts"]["gaps"] > 0.5
    assert slow["difference"] == ""
    facts = Facts.from_json(fast["diagnosis"]["facts"])
    assert facts.gaps < slow["diagnosis"]["facts"]["gaps"] / 2  # it adds, and does nothing else
    assert facts.steps == 3
    assert fast["diagnosis"]["bottleneck"] == decide(facts).bottleneck != "python"
    assert "the step took" in fast["difference"] or "faster" in fast["difference"]
    assert "diagnosis" not in plain
    json.dumps([slow, fast], allow_nan=False)


def test_a_report_holds_its_steps_and_what_was_counted_without_the_profiler(tmp_path):
    calls = []
    record(lambda: calls.append(0), 4, tmp_path / "report.json.gz")
    assert len(calls) == 4 + 1 + 4  # counted, the profiler's warm-up, recorded
    (trace,) = load(tmp_path).traces
    assert len(steps(trace)) == 4
    assert trace.process["cores"] >= 1
    assert 0 <= trace.process["user_s"] + trace.process["system_s"] < 60


def test_a_second_recording_in_one_process_is_whole(tmp_path):
    """The recorder takes torch's profiler over for the time of one recording only."""
    from torch import profiler

    before = profiler.profile.start
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        record(lambda: None, 3, folder / "report.json.gz")
        assert len(steps(load(folder).traces[0])) == 3
    assert profiler.profile.start is before


def test_a_report_that_cannot_be_written_leaves_torchs_profiler_as_it_was(tmp_path):
    from torch import autograd, profiler

    before = profiler.profile.start, autograd.profiler.profile.__enter__
    with pytest.raises(Exception, match="nowhere"):
        record(lambda: None, 3, tmp_path / "nowhere" / "report.json.gz")
    assert (profiler.profile.start, autograd.profiler.profile.__enter__) == before


def test_what_was_counted_beforehand_comes_without_a_series_of_other_steps(tmp_path):
    record(lambda: time.sleep(0.01), 4, tmp_path / "report.json.gz")
    (trace,) = load(tmp_path).traces
    assert trace.process["steps"] == 4
    assert "series" not in trace.process
    recorder = TorchRecorder()
    recorder.start()
    time.sleep(0.05)
    recorder.stop(tmp_path / "other.json.gz")
    other = load(tmp_path / "other.json.gz").traces[0].process
    assert len(other["series"][0]) == len(other["columns"])


def test_a_variant_whose_profile_fails_is_an_error_of_the_group():
    def setup(config, recorder):
        calls = []

        def step():
            calls.append(0)
            if len(calls) > 400:
                raise RuntimeError("planted")
            return 1.0

        return step

    variant = Variant("group", "late", setup, profiled=1000, max_rounds=1)
    failing = Lab(
        *("mine", "?", "!", dict), variants=lambda config: [variant], check=lambda config, outputs: []
    )
    result = measure_group(failing, {}, "group", budget_seconds=0.01)
    assert result.errors["group/late"].startswith("profile: RuntimeError: planted")
    assert len(result.measured) == 1


pytestmark = pytest.mark.filterwarnings("ignore:Profiler clears events")
