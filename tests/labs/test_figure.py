"""Figures as data: what several labs draw."""

import math
from dataclasses import dataclass

from stated import Stated, machine

from labs.figure import measured_and_predicted


@dataclass
class Foretold(Stated):
    """Half of the measured time was predicted, of ``a/slow`` nothing."""

    def predicted(self, variant, key="time_s"):
        return None if variant == "a/slow" else self.times[variant] / 2


RESULTS = Foretold(None, machine(), {"default": {"a/fast": 2.0, "a/slow": 8.0, "b/fast": 4.0}})


def test_variants_of_one_group_are_called_by_name_and_unpredicted_ones_have_no_second_bar():
    bars = measured_and_predicted(RESULTS, ["a/fast", "a/slow", "a/not_run"], "Times")
    assert bars.labels == ["fast", "slow"]
    assert bars.series["measured"] == [2.0, 8.0]
    assert bars.series["predicted"][0] == 1.0
    assert math.isnan(bars.series["predicted"][1])


def test_variants_of_several_groups_are_called_by_address():
    assert measured_and_predicted(RESULTS, ["a/fast", "b/fast"], "Times").labels == ["a/fast", "b/fast"]


def test_nothing_measured_draws_nothing():
    assert measured_and_predicted(RESULTS, ["a/not_run"], "Times") is None
