"""The doctor names what would spoil a measurement, and says what can be told apart right now."""

import json
import sys

import pytest
from command import perflab

from bench import doctor


def findings(subject):
    return [finding for finding in doctor.examine() if finding.subject == subject]


def test_the_command_says_what_can_be_resolved(tmp_path):
    status, out, _ = perflab("doctor", "--json", folder=tmp_path)
    report = json.loads(out)
    test = report["self_test"]
    assert test["low"] <= test["ratio"] <= test["high"]
    assert 0.02 <= test["resolvable"] < 0.5
    bad = [finding for finding in report["findings"] if finding["level"] == "bad"]
    assert status == (1 if bad or test["verdict"] in ("slower", "faster") else 0)
    assert {"load", "frequency", "threads", "allocator", "imports"} <= {
        f["subject"] for f in report["findings"]
    }


def test_oversubscribed_threads_are_bad(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    (finding,) = findings("threads")
    assert finding.level == doctor.BAD
    assert "OMP_NUM_THREADS=4096" in finding.text


def test_each_variable_of_threads_is_looked_at(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    monkeypatch.setenv("NUMBA_NUM_THREADS", "4096")
    (finding,) = findings("threads")
    assert finding.level == doctor.BAD
    assert "OMP_NUM_THREADS='many'" in finding.text
    assert "NUMBA_NUM_THREADS=4096" in finding.text


def test_a_module_of_the_folder_that_would_be_taken_for_ours_is_warned_of(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert all(finding.level == doctor.GOOD for finding in findings("imports"))
    (tmp_path / "bench.py").write_text("")
    (finding,) = findings("imports")
    assert finding.level == doctor.WARNING
    assert str(tmp_path / "bench.py") in finding.text


def test_a_distribution_that_owns_our_names_is_bad(monkeypatch, tmp_path):
    metadata = tmp_path / "kernels_hub-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels-hub\nVersion: 1.0\n")
    (metadata / "top_level.txt").write_text("kernels\n")
    assert all(finding.level == doctor.GOOD for finding in findings("imports"))
    monkeypatch.syspath_prepend(str(tmp_path))
    (finding,) = findings("imports")
    assert finding.level == doctor.BAD
    assert "kernels-hub also owns a package named 'kernels'" in finding.text


def test_a_folder_that_shadows_ours_is_bad(tmp_path):
    (tmp_path / "labs").mkdir()
    (tmp_path / "labs" / "__init__.py").write_text("")
    import subprocess

    code = "from bench import doctor; print(doctor.examine())"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "'import labs' finds" in done.stdout, done.stderr


def test_a_quota_below_the_cores_is_a_warning_that_says_what_to_do(monkeypatch):
    from kernels import cores

    monkeypatch.setattr(cores, "affinity", lambda: set(range(8)))
    for quota, level in ((None, None), (8.0, doctor.GOOD), (2.5, doctor.WARNING)):
        monkeypatch.setattr(cores, "cpu_quota", lambda quota=quota: quota)
        found = findings("quota")
        assert [finding.level for finding in found] == ([level] if level else [])
    assert "2.5 cores' time on 8 cores" in found[0].text
    assert "pin the process to 2 of them" in found[0].text


def test_a_busy_machine_is_noticed():
    import subprocess

    import psutil

    spinners = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(psutil.cpu_count() or 1)
    ]
    try:
        (finding,) = findings("load")
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait(10)
    assert finding.level == doctor.BAD


@pytest.mark.alone
def test_the_self_test_compares_work_with_itself():
    test = doctor.self_test(0.3)
    assert 0.5 < test.comparison.ratio < 2
    assert test.pairs > 50
