"""A lab run by itself: its help, and a missing runner."""

import importlib.metadata
import sys

import pytest

from bench.results import foretold, summary
from labs import NAMES, lab, load


@pytest.mark.parametrize("name", NAMES)
def test_every_labs_help_has_each_of_its_settings_as_it_is_written(name):
    found = load(name)
    shown = " ".join(lab.parser(found, name).format_help().split())
    for setting in lab.fields(found.config):
        option = setting.name.replace("_", "-")
        assert f"--set-{option} " in shown or (f"--{option} " in shown and option not in lab.OWN)
        written = f"{setting.metadata['help']} (default {setting.default})"
        # A long text is broken at hyphens too.
        assert written.replace("- ", "-").replace(" ", "") in shown.replace("- ", "-").replace(" ", "")


def test_settings_come_from_their_options_and_the_results_file_from_its_own():
    given = ["--set-output", "9", "--output", "file"]
    parsed = vars(lab.parser(load("serving"), "serving").parse_args(given))
    assert (parsed["set_output"], parsed["output"]) == ("9", "file")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([], "there is none"),
        (["bench.runner:main", "other:run"], "there are 2: bench.runner:main, other:run"),
    ],
)
def test_a_runner_that_is_not_there_or_not_the_only_one_is_said(monkeypatch, capsys, values, said):
    found = [importlib.metadata.EntryPoint("runner", value, "perflab.runner") for value in values]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: found)
    monkeypatch.setattr(sys, "argv", ["labs.tuning"])
    with pytest.raises(SystemExit) as ended:
        lab.main("tuning")
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_fitted_time_is_no_predicted_one():
    def row(ratio, verdict, **more):
        return {"key": "time_s", "exact": False, "ratio": ratio, "verdict": verdict} | more

    rows = [row(2.0, "close"), row(1.0, "confirmed", fitted=True), row(9.0, "off", fitted=True)]
    assert summary(foretold(rows)) == {"times": 1, "median_abs_log2": 1.0, "off": 0}
    assert summary(foretold([*rows, row(9.0, "off", fitted=False)]))["off"] == 1
