"""A lab as another repository would bring it: sorting. Its settings plant faults for the runner's tests."""

import random
from dataclasses import dataclass

from labs.figure import Bars
from labs.lab import (
    Check,
    Claim,
    Lab,
    Measurement,
    Prediction,
    Recorder,
    Results,
    Variant,
    at_least,
    main,
    setting,
)

FAULTS = ("", "raise", "late", "wrong", "exit", "claim", "predict", "variants", "derive", "figure", "count")
LATE = 100  # calls: in the timed rounds


@dataclass(frozen=True)
class Config:
    items: int = setting(
        2000, unit="numbers", help="length of the list", quick=1000, minimum=1, maximum=10**12
    )
    pause: float = setting(0.0, unit="s", help="sleep in each step of the second group", minimum=0.0)
    fault: str = setting("", unit="", help="what to plant", choices=FAULTS)


def _list(config: Config) -> list[float]:
    return [random.Random(0).random() for _ in range(config.items)]


def setup_sorted(config: Config, recorder: Recorder):
    numbers = _list(config)
    recorder.text("program", "sorted(numbers)")
    return lambda: sorted(numbers)


def setup_insertion(config: Config, recorder: Recorder):
    import os
    import time
    from bisect import insort

    numbers = _list(config)
    calls = 0

    def step():
        nonlocal calls
        calls += 1
        if config.fault == "raise" or (config.fault == "late" and calls > LATE):
            raise RuntimeError("planted")
        if config.fault == "exit":
            os._exit(9)
        result: list[float] = []
        for number in numbers:
            insort(result, number)
        recorder.record("inserted", len(result) - (config.fault == "count" and LATE <= calls < LATE + 9), "")
        time.sleep(config.pause)
        return result[1:] if config.fault == "wrong" else result

    return step


def variants(config: Config):
    if config.fault == "variants":
        raise ArithmeticError("planted in variants")
    for group in ("first", "second"):
        yield Variant(group, "sorted", setup_sorted)
        if group == "second":
            yield Variant(group, "insertion", setup_insertion)
            yield Variant(group, "quantum", setup_sorted, unavailable="there is no quantum computer here")


def predict(config: Config, machine):
    if config.fault == "predict":
        raise ArithmeticError("planted in predict")
    times = [
        Prediction(f"{group}/sorted", "time_s", 3e-8 * config.items, "items x 30 ns", "cache misses")
        for group in ("first", "second")
    ]
    inserted = Prediction("second/insertion", "inserted", config.items, "each item once", exact=True)
    return [*times, inserted, Prediction("", "insertion_ratio", 10.0, "a guess", "the length of the list")]


def check(config: Config, outputs):
    expected = sorted(_list(config))
    return [Check(name, float(out != expected), 0.0, "sorted()") for name, out in outputs.items()]


def insertion_is_slower(results: Results):
    ratio = results.ratio("second/insertion", "second/sorted")
    return at_least(ratio, 1e9 if results.config.fault == "claim" else 1.5)


def derive(results: Results):
    if results.config.fault == "derive":
        raise ArithmeticError("planted in derive")
    return [Measurement("insertion_ratio", results.ratio("second/insertion", "second/sorted"))]


def figure(results: Results):
    if results.config.fault == "figure":
        raise ArithmeticError("planted in figure")
    names = results.variants()
    values = [results.seconds(name).value for name in names]
    return [Bars("time by variant", "time (s)", names, {"measured": values})]


LAB = Lab(
    name="tiny_lab",
    question="How fast does Python sort?",
    answer="sorted() beats sorting by insertion.",
    config=Config,
    variants=lambda config: list(variants(config)),
    check=check,
    predict=predict,
    claims=(Claim("insertion is at least 1.5 times slower", insertion_is_slower, "quadratic moves"),),
    derive=derive,
    figure=figure,
    memory_bytes=lambda config: 64.0 * config.items,
    seconds=0.5,
)

if __name__ == "__main__":
    main("tiny_lab")
