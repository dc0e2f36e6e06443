"""Variants of the tuning lab, run as the runner runs them, and what they recorded."""

import time

from labs import load
from labs.lab import find

LAB = load("tuning")


class Notes:
    """A recorder that keeps lists."""

    now = staticmethod(time.perf_counter)

    def __init__(self):
        self.values = {}

    def record(self, name, value, unit):
        self.values.setdefault(f"{name}_{unit}" if unit else name, []).append(value)


def measured(config, addresses):
    """(what each variant returns, what it records), set up together as the runner does."""
    notes = {address: Notes() for address in addresses}
    steps = {address: find(LAB, config, address).setup(config, notes[address]) for address in addresses}
    try:
        return {address: step() for address, step in steps.items()}, notes
    finally:
        for step in steps.values():
            getattr(step, "close", lambda: None)()
