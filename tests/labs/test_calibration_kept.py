"""Constants that are kept: what fails is left out and tried again, and another machine is measured anew."""

import io
from contextlib import nullcontext
from dataclasses import replace

from rich.console import Console
from stated import machine as stated

from bench.report.terminal import print_machine
from labs import calibration, calibration_facts, calibration_gpu
from labs import calibration_hardware as hardware
from labs import machine as machines


def stub(monkeypatch, tmp_path, **parts):
    """A calibration of these parts alone: name -> seconds, or the error that it raises."""
    monkeypatch.setenv("PERFLAB_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "_first", lambda: ())
    monkeypatch.setattr(calibration, "_compilers", lambda: nullcontext(()))
    monkeypatch.setattr(calibration, "doubts", lambda machine: [])
    monkeypatch.setattr(calibration, "recheck", lambda machine: {"copy_all": 1.0})
    monkeypatch.setattr(hardware, "curves", lambda cores, largest: dict(stated().curves))
    monkeypatch.setattr(calibration_gpu, "absent", lambda: "this test has none")
    monkeypatch.setattr(calibration_gpu, "device_name", lambda: "")

    def measure(name):
        def part():
            found = parts[name]
            found = found.pop(0) if isinstance(found, list) else found
            if isinstance(found, Exception):
                raise found
            return {f"{name}_s": (found, f"stated by {name}")}

        return part

    monkeypatch.setattr(calibration, "_parts", lambda cores: [(name, measure(name)) for name in parts])


def test_a_part_that_fails_costs_no_other_and_one_success_forgets_it(monkeypatch, tmp_path) -> None:
    stub(
        monkeypatch,
        tmp_path,
        broken=TypeError("a library's\nown mistake"),
        late=[ImportError("busy"), 3.0, 3.0],
        fine=2.0,
    )
    machine = calibration.calibrate()
    assert (machine["fine_s"], machine["late_s"]) == (2.0, 3.0)
    assert "broken_s" not in machine.constants
    assert machine.facts["left_out"] == {"broken": "TypeError: a library's own mistake"}
    assert machine.facts["sweeps"] == calibration.SWEEPS
    assert machine.gpu is None
    assert machine.facts["gpu"] == "none: this test has none"


def test_what_was_left_out_is_measured_as_soon_as_it_can_be(monkeypatch, tmp_path) -> None:
    parts = {"late": OSError("no compiler"), "fine": 2.0}
    stub(monkeypatch, tmp_path, **parts)
    calibration.current()
    stub(monkeypatch, tmp_path, **parts)
    machine, message = calibration.current()
    assert "hold: anchors" in message
    assert machine.facts["left_out"] == {"late": "OSError: no compiler"}
    stub(monkeypatch, tmp_path, late=3.0, fine=9.0)
    machine, message = calibration.current()
    assert "hold: anchors" in message
    assert (machine["late_s"], machine["fine_s"]) == (3.0, 2.0), "the others are kept"
    assert machine.sources["late_s"] == "stated by late"
    assert "left_out" not in machine.facts
    assert machines.load_cached().to_json() == machine.to_json(), "and it is written down"


def test_another_package_or_accelerator_is_another_machine(monkeypatch, tmp_path) -> None:
    stub(monkeypatch, tmp_path, fine=2.0)
    calibration.current()
    assert "hold: anchors" in calibration.current()[1]
    versions = calibration_facts.versions()
    monkeypatch.setattr(calibration_facts, "versions", lambda: {**versions, "torch": "99.1+cu990"})
    _, message = calibration.current()
    assert message.startswith("measured anew, since the software or the accelerator is another")
    assert f"torch {versions['torch']} -> 99.1+cu990" in message
    assert "hold: anchors" in calibration.current()[1]
    monkeypatch.setattr(calibration_facts, "versions", lambda: versions)
    calibration.current()
    device = replace(stated(), name="NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(calibration_gpu, "absent", lambda: "")
    monkeypatch.setattr(calibration_gpu, "device_name", lambda: device.name)
    monkeypatch.setattr(calibration_gpu, "measure", lambda: device)
    machine, message = calibration.current()
    assert "GPU none -> NVIDIA H100 80GB HBM3" in message
    assert machine.gpu == device
    assert "gpu" not in machine.facts
    assert "hold: anchors" in calibration.current()[1]


def test_an_accelerator_that_could_not_be_measured_is_tried_again(monkeypatch, tmp_path) -> None:
    stub(monkeypatch, tmp_path, fine=2.0)
    monkeypatch.setattr(calibration_gpu, "absent", lambda: "")
    monkeypatch.setattr(calibration_gpu, "device_name", lambda: "NVIDIA H100 80GB HBM3")

    def out_of_memory():
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(calibration_gpu, "measure", out_of_memory)
    assert calibration.current()[0].facts["gpu"] == "not measured: out of memory"
    device = replace(stated(), name="NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(calibration_gpu, "measure", lambda: device)
    machine, message = calibration.current()
    assert "hold: anchors" in message
    assert machine.gpu == device


def test_constants_that_moved_within_minutes_are_kept_and_later_measured_anew(monkeypatch, tmp_path) -> None:
    stub(monkeypatch, tmp_path, fine=2.0)
    first, _ = calibration.current()
    monkeypatch.setattr(calibration, "recheck", lambda machine: {"copy_all": 0.5})
    kept, message = calibration.current()
    assert kept.measured_at == first.measured_at
    assert "changing by the minute (copy_all 0.50x)" in message
    machines.save(replace(first, measured_at="2026-01-01T00:00:00+00:00"))
    anew, message = calibration.current()
    assert anew.measured_at != "2026-01-01T00:00:00+00:00"
    assert "no longer hold (copy_all 0.50x)" in message


def test_a_calibration_is_printed_with_what_is_missing_and_what_is_doubted() -> None:
    facts = {
        "left_out": {"jax": "ImportError: no jax"},
        "doubts": ["copy is above"],
        "gpu": "none: no device",
        "sweeps": 2,
        "calibrated_in": "17.5 s",
    }
    file = io.StringIO()
    print_machine(replace(stated(), facts=facts), Console(file=file, width=200))
    for line in (
        "left out: jax: ImportError: no jax",
        "doubtful: copy is above",
        "GPU: none: no device",
        "measured 2 times over in 17.5 s",
    ):
        assert line in file.getvalue()
