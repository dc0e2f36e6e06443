"""A recorder that keeps what a variant records, for tests that run one without the runner."""

import time


class Kept:
    """values: lists by name with unit, as in results."""

    now = staticmethod(time.perf_counter)

    def __init__(self):
        self.values = {}

    def record(self, name, value, unit):
        self.values.setdefault(f"{name}_{unit}" if unit else name, []).append(value)
