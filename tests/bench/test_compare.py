"""``perflab compare``: same, slower, faster, or cannot be told, for our files and for plain ones."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from bench.compare import compare_files, parse_share
from bench.results import load

COMMITTED = Path(__file__).resolve().parents[2] / "docs" / "results.json"


def slowed(results, factor):
    """A copy whose samples are all slower by a factor."""
    made = copy.deepcopy(results)
    for entry in made["benchmarks"]:
        data = [value * factor for value in entry["stats"]["data"]]
        entry["stats"].update(data=data, median=float(np.median(data)))
    return made


@pytest.fixture
def calm(results):
    """The finished run with the samples of a calm machine: what this one did meanwhile decides no test."""
    made = copy.deepcopy(results)
    noise = np.exp(0.005 * np.random.default_rng(0).standard_normal(30))
    for entry in made["benchmarks"]:
        data = (entry["stats"]["median"] * noise).tolist()
        entry["stats"].update(data=data, median=float(np.median(data)), rounds=len(data))
    return made


def plain(medians, data=None):
    """What pytest-benchmark saves; without samples unless --benchmark-save-data was given."""
    entries = []
    for name, median in medians.items():
        stats = {"median": median, "mean": median, "rounds": 7}
        if data is not None:
            stats["data"] = [median * part for part in data]
        entries.append({"fullname": name, "name": name, "stats": stats})
    return {"benchmarks": entries, "machine_info": {}}


def write(path, data):
    path.write_text(json.dumps(data))
    return path


def test_a_file_with_itself_is_the_same(finished_run, run):
    file = finished_run[0] / "results.json"
    status, out, _ = run("compare", file, file, "--fail-above", "5%")
    assert status == 0
    assert out.startswith("3 compared: all 3 same")


def test_a_copy_slowed_by_20_percent_is_slower_and_fails_the_gate(tmp_path, run):
    committed = load(COMMITTED)
    committed["benchmarks"] = committed["benchmarks"][:40]
    base = write(tmp_path / "base.json", committed)
    new = write(tmp_path / "new.json", slowed(committed, 1.2))
    status, out, err = run("compare", base, new, "--fail-above", "5%")
    assert status == 1
    assert "slower by more than 5 %" in err
    assert "slower" in out.splitlines()[0]
    status, out, _ = run("compare", new, base, "--fail-above", "5%", "--json")
    assert status == 0
    verdicts = {row["verdict"] for row in json.loads(out)["rows"]}
    assert "slower" not in verdicts
    assert "faster" in verdicts


def test_markdown_is_a_table(calm, tmp_path, run):
    base, new = write(tmp_path / "base.json", calm), write(tmp_path / "new.json", slowed(calm, 1.5))
    status, out, _ = run("compare", base, new, "--markdown")
    assert status == 0
    assert out.count("| slower |") == 3
    assert "1.500" in out


def test_the_history_compares_the_last_two_runs(calm, home, run):
    from bench.history import folder as history_folder
    from bench.history import keep, last

    status, _, err = run("compare", "--last", "2", "rooflin")
    assert status == 2
    assert "did you mean 'roofline'" in err
    stored = history_folder()
    stored.mkdir(parents=True, exist_ok=True)
    for stamp, factor in (("29990101T000000", 1.0), ("29990101T000001", 1.3)):
        slower = slowed(calm, factor)
        slower["perflab"]["started"] = f"{stamp[:4]}-01-01T00:00:{stamp[-2:]}"
        assert keep(slower).name.startswith(f"{stamp}_tiny_lab")
    (stored / "29990101T000009_tiny_lab.json").write_text('{"cut": sho')
    try:
        assert [path.name[:15] for path in last(2, "tiny_lab")] == ["29990101T000000", "29990101T000001"]
        status, out, _ = run("compare", "--last", "2", "tiny_lab")
        assert status == 0
        assert "all 3 slower" in out.splitlines()[0]
    finally:
        for path in stored.glob("2999*"):
            path.unlink()


def test_plain_files_without_samples_are_undecidable_and_say_why():
    comparison = compare_files(plain({"a": 1.0, "b": 1.0}), plain({"a": 1.5, "c": 1.0}))
    (row,) = comparison.rows
    assert (row.verdict, row.ratio) == ("undecidable", 1.5)
    assert "--benchmark-save-data" in row.note
    assert (comparison.added, comparison.removed) == (["c"], ["b"])


def test_plain_files_with_samples_are_compared():
    samples = np.exp(0.01 * np.random.default_rng(0).standard_normal(50)).tolist()
    comparison = compare_files(plain({"a": 1.0}, samples), plain({"a": 1.1}, samples))
    assert comparison.rows[0].verdict == "slower"
    assert comparison.rows[0].ratio == pytest.approx(1.1)


def test_different_machines_settings_and_versions_are_warned_of(results):
    other = copy.deepcopy(results)
    other["machine_info"]["perflab"]["fingerprint"] = "another"
    other["machine_info"]["perflab"]["versions"]["numpy"] = "1.0"
    other["perflab"]["labs"]["tiny_lab"]["settings"][0]["value"] = 7
    comparison = compare_files(results, slowed(other, 2.0))
    assert {(row.verdict, row.note) for row in comparison.rows} == {
        ("undecidable", "other settings of tiny_lab")
    }
    assert not comparison.above(0.05)
    warnings = comparison.warnings
    assert any("machines" in line for line in warnings)
    assert any("numpy" in line for line in warnings)
    assert any("settings of tiny_lab: items 1000 and 7" in line for line in warnings)


@pytest.mark.parametrize("settings", [None, "many", [{}], [None], [{"name": "items"}]])
def test_settings_of_a_damaged_file_are_no_crash(results, settings):
    other = copy.deepcopy(results)
    other["perflab"]["labs"]["tiny_lab"]["settings"] = settings
    assert any("settings of tiny_lab" in line for line in compare_files(results, other).warnings)


FEW, MANY = [1.0, 1.01, 0.99, 1.0], [1.0, 1.01, 0.99, 1.0, 1.02, 0.98]


@pytest.mark.parametrize(("data", "why"), [(None, "--benchmark-save-data"), (FEW, "only 4 rounds")])
def test_a_gate_that_can_hold_nothing_is_wrong_input(tmp_path, run, data, why):
    base = write(tmp_path / "base.json", plain({"a": 1.0}, data))
    new = write(tmp_path / "new.json", plain({"a": 9.0}, data))
    status, _, err = run("compare", base, new, "--fail-above", "5%")
    assert status == 2
    assert "no benchmark has an interval" in err
    assert why in err
    status, _, err = run("compare", base, new)  # without a gate it is only shown
    assert status == 0


def test_the_gate_says_what_it_could_not_hold(tmp_path, run):
    base = write(tmp_path / "base.json", plain({"a": 1.0, "b": 1.0, "gone": 1.0}, MANY))
    data = plain({"a": 1.0, "b": 1.05}, MANY)
    status, out, err = run("compare", base, write(tmp_path / "new.json", data), "--fail-above", "5%")
    assert status == 0
    assert err == "0 of 2 slower by more than 5 %; 1 cannot be told; 1 only in base, not compared\n"
    assert "not interleaved" in " ".join(out.split())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file"),
        ("", "is not complete JSON"),
        ('{"benchmarks": [{"fullname": "a", "sta', "is not complete JSON"),
        ("[1, 2]", "no benchmark results"),
        ('{"traceEvents": []}', "no benchmark results"),
        ('{"benchmarks": [{"name": "a"}]}', r"benchmarks\[0\] has no"),
    ],
)
def test_missing_truncated_and_foreign_files_are_refused(tmp_path, content, message):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load(path)


@pytest.mark.parametrize("command", ["report", "compare"])
def test_a_refused_file_is_one_line_and_exit_2(tmp_path, command, run):
    path = tmp_path / "cut.json"
    path.write_text('{"benchmarks": [{"fullname": "a", "sta')
    status, _, err = run(command, *[path] * (1 + (command == "compare")))
    assert status == 2
    assert err.startswith("perflab: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(("text", "share"), [("5%", 0.05), ("0.05", 0.05), ("0%", 0.0)])
def test_shares(text, share):
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["five", "-1%", "nan", "%"])
def test_no_shares(text):
    with pytest.raises(ValueError, match="takes a share"):
        parse_share(text)
