"""Variants of the tuning lab, run as the runner runs them, and what they recorded."""

from kept import Kept

from labs import load
from labs.lab import find

LAB = load("tuning")


def measured(config, addresses):
    """(what each variant returns, what it records), set up together as the runner does."""
    notes = {address: Kept() for address in addresses}
    steps = {address: find(LAB, config, address).setup(config, notes[address]) for address in addresses}
    try:
        return {address: step() for address, step in steps.items()}, notes
    finally:
        for step in steps.values():
            getattr(step, "close", lambda: None)()
