"""The tuning lab's aims, in full: five seeds against random search, warm workers against Ray Tune.

On workers of their own sizes, which is why they are not beside the tests that keep some for a tiny task.
"""

import time

import pytest
from kept import Kept
from tuning_searches import LAB, measured

from labs.concurrency import cluster
from labs.lab import NotMeasured, configure, find
from labs.tuning import claims, curves
from labs.tuning.config import METHODS

SEEDS = range(5)
NO_RAY = pytest.mark.skipif(bool(cluster.unavailable()), reason="Ray is not installed")


@pytest.mark.proof
@pytest.mark.ray
@pytest.mark.timeout(600)
@NO_RAY
def test_halving_by_drawn_on_curves_arrives_in_a_quarter_of_random_searchs_time(two_ray_workers):
    """On at least four of five seeds, within the target of the best of full random search over the same
    configurations; for each method the figures are printed, and for a miss what the first rung knew."""
    arrived = {name: 0 for name in METHODS if name != "random"}
    for seed in SEEDS:
        config = configure(LAB, "normal", {"seed": seed})
        addresses = [f"search/{name}" for name in METHODS]
        _, notes = measured(config, addresses)
        found = Recorded(config, notes)
        whole = found.seconds("search/random").value
        print(
            f"\nseed {seed}: random search {whole:.1f} s, best {curves.best(found, 'search/random'):.3f} nats"
        )
        for name in arrived:
            address = f"search/{name}"
            reached = curves.time_to_target(found, address)
            arrived[name] += reached is not None and reached <= whole / 4
            arrival = "never" if reached is None else f"at {reached / whole:.2f}"
            share, regret = found.seconds(address).value / whole, curves.regret(found, address)
            busy = notes[address].values["utilisation_ratio"][0]
            print(
                f"  {name:20} within {config.target_nats} nats {arrival} of its time, all {share:.2f}, "
                f"regret {regret:.3f} nats, utilisation {busy:.2f}"
            )
        for step in config.rungs()[:-1]:
            plain, drawn = (curves.with_the_end(found, step, each) for each in (False, True))
            print(f"  rank correlation at {step} steps {plain:.2f}, of drawn-on curves {drawn:.2f}")
        print(f"  the winner is {'kept' if claims.kept(found) else 'hidden'} at the first rung")
    print(f"\nwithin the target in a quarter of random search's time, of {len(SEEDS)} seeds: {arrived}")
    assert arrived["asha_extrapolated"] >= 4


class Recorded:
    """What was noted, as the functions on curves ask for it."""

    def __init__(self, config, notes):
        self.config, self.notes = config, notes

    def has(self, *addresses):
        return all(address in self.notes for address in addresses)

    def recorded(self, address, name):
        if name not in self.notes[address].values:
            raise NotMeasured(f"{address} recorded no {name!r}")
        return self.notes[address].values[name]

    def seconds(self, address):
        from labs.lab import Interval

        return Interval.exact(max(self.recorded(address, "job_end_s")))


@pytest.mark.proof
@pytest.mark.ray
@pytest.mark.timeout(300)
@NO_RAY
def test_warm_workers_are_three_times_as_fast_as_ray_tunes_default(two_ray_workers):
    config = configure(LAB, "normal")
    seconds = {}
    for name in ("ray_tune", "ray_tune_reused", "warm_workers"):
        address = f"start/{name}"
        step = find(LAB, config, address).setup(config, Kept())
        begin = time.perf_counter()
        output = step()
        seconds[name] = time.perf_counter() - begin
        getattr(step, "close", lambda: None)()
        assert all(check.passed for check in LAB.check(config, {address: output}))
    print(f"\n{config.peer_trials} trials of {config.most_steps} steps: {seconds} s")
    assert seconds["ray_tune"] >= 3 * seconds["warm_workers"]
