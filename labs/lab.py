"""What a lab is: a question, a prediction, variants of the same work, a proof and claims.

A lab declares; it never measures and never prints. The runner (found through the entry point
``perflab.runner``) asks it, in this order:

1. ``predict(config, machine)``  the formula as code, written down before anything is timed;
2. ``variants(config)``          the ways to do the same work, in groups that are timed interleaved;
3. ``check(config, outputs)``    what every variant returned from the very step that is timed,
                                 held against a reference;
4. ``derive(results)``           quantities that need several variants (a crossover, a slope);
5. ``claims``                    what the lab teaches, each decided by the results;
6. ``figure(results)``           the picture, as data (``labs/figure.py``).
"""

from __future__ import annotations

import argparse
import difflib
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, Protocol, runtime_checkable

from labs.figure import Figure
from labs.machine import Machine

Scale = Literal["quick", "normal", "full"]
Clock = Literal["host", "jax", "cuda"]
Allocator = Literal["default", "tuned"]


class Recorder(Protocol):
    """Handed to each variant's setup, for the few that must observe their own time."""

    def now(self) -> float:
        """Seconds on the runner's clock (CLOCK_MONOTONIC: one clock for all processes of a host)."""

    def record(self, name: str, value: float, unit: str) -> None:
        """Note a value of the current round. Calls with one name make a list."""

    def text(self, title: str, text: str) -> None:
        """Keep a text that the report shows as it is: a captured program, generated code, a message.

        A second text of the same title replaces the first. ``Results.info(variant, "texts")`` has them all.
        """


Step = Callable[[], object]
"""The work to time. Its return value is proof material. ``close()``, if it has one, ends it."""


@dataclass(frozen=True)
class Variant:
    """One way to do a group's work.

    ``group/name`` addresses the variant inside its lab; together with the lab's name and config
    it can be found again in any process, so that no closure ever crosses a process boundary.

    setup: ``setup(config, recorder) -> step``. Everything that is not the work itself (inputs,
        buffers, pools, compilation of other code) happens here, untimed. The first call of the
        step is reported as the cold call and never enters a median.
    flops: floating-point operations of one step (0: not a meaningful figure).
    bytes_moved: bytes that one step must read and write, each operand counted once.
    working_set: bytes touched by one step; decides which bandwidth is the limit.
    threads: 1, or 0 for all cores: which of the machine's limits it is held against.
    processes: ranks of a torch.distributed world that run the step together; the time of a round
        is the slowest rank's.
    clock: ``host``; ``jax`` waits for the returned arrays (``block_until_ready``); ``cuda``
        uses device events.
    max_rounds: an upper bound on timed rounds, for steps whose side effects are costly.
    profiled: steps that are recorded by torch.profiler when the rounds are over (0: none). The runner's
        diagnosis of the report enters the results as ``diagnosis``, and how it differs from the report of the
        group's first variant as ``difference``.
    unavailable: why it cannot run on this machine; it is then listed with the reason.
    """

    group: str
    name: str
    setup: Callable[[Any, Recorder], Step]
    flops: float = 0.0
    bytes_moved: float = 0.0
    working_set: float = 0.0
    dtype: str = "float32"
    threads: int = 1
    processes: int = 1
    clock: Clock = "host"
    max_rounds: int = 0
    profiled: int = 0
    unavailable: str = ""

    @property
    def address(self) -> str:
        return f"{self.group}/{self.name}"


@dataclass(frozen=True)
class Prediction:
    """A number stated before the measurement.

    variant: address of the variant it is about, or "" for a quantity that ``derive`` measures.
    key: what is predicted, with its unit at the end: ``time_s``, ``crossover_task_s``, ``sent_B``.
    because: the formula with its numbers filled in, one line.
    suspect: the first thing to suspect when the measurement is off by more than a factor of two.
    exact: True for counted quantities (bytes, operations), which must match exactly.
    fitted: True where most of it is a factor that was chosen to match such a measurement: it is shown, and
        not counted among the times that were predicted.
    """

    variant: str
    key: str
    value: float
    because: str
    suspect: str = ""
    exact: bool = False
    fitted: bool = False


@dataclass(frozen=True)
class Interval:
    """A measured value with the 95 % interval of its median."""

    value: float
    low: float
    high: float

    @classmethod
    def exact(cls, value: float) -> Interval:
        return cls(value, value, value)

    @classmethod
    def of_few(cls, values: Sequence[float]) -> Interval:
        """The median, between the least and the most: for five values a 94 % interval of it."""
        return cls(statistics.median(values), min(values), max(values))

    def over(self, other: Interval) -> Interval:
        """The ratio of two positive values that were not measured in pairs."""
        return Interval(self.value / other.value, self.low / other.high, self.high / other.low)


@dataclass(frozen=True)
class Measurement:
    """A quantity that ``derive`` computed from several variants; ``key`` matches a Prediction's."""

    key: str
    interval: Interval


@dataclass(frozen=True)
class Check:
    """Proof that a variant computes the same thing: ``error`` must be at most ``tolerance``."""

    variant: str
    error: float
    tolerance: float
    against: str

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


class NotMeasured(LookupError):
    """What ``Results`` raises when it is asked for what was not measured on this machine.

    A claim that lets it pass is undecidable here, ``derive`` gives no quantity, and there is no figure.
    """


@runtime_checkable
class Results(Protocol):
    """What was measured, as claims, ``derive`` and figures see it. Addresses are ``group/name``.

    Whatever was not measured on this machine (a variant that could not run, a name that was not recorded)
    raises ``NotMeasured``; any other exception of a claim, ``derive`` or ``figure`` is a fault of the lab.
    """

    config: Any
    machine: Machine

    def variants(self, group: str | None = None) -> Sequence[str]:
        """Addresses of the variants that have been measured, in the lab's order."""

    def has(self, *variants: str) -> bool: ...

    def seconds(self, variant: str) -> Interval:
        """Median seconds of one step with its interval."""

    def cold_seconds(self, variant: str) -> float:
        """Seconds of the first call."""

    def cpu_seconds(self, variant: str) -> float:
        """Median CPU seconds of one step, of this process and its children, all threads."""

    def ratio(self, new: str, base: str) -> Interval:
        """seconds(new) / seconds(base), paired round by round when both are of one group."""

    def recorded(self, variant: str, name: str) -> Sequence[float]:
        """Values the variant recorded under ``name`` in its last timed round."""

    def info(self, variant: str, key: str, default: Any = None) -> Any:
        """An entry of the variant's ``extra_info``."""

    def predicted(self, variant: str, key: str = "time_s") -> float | None: ...

    def in_column(self, allocator: Allocator) -> Results:
        """The same lab measured under the other allocator mode."""


def values_of(results: Results, variant: str, name: str) -> Sequence[float]:
    """``results.recorded``, and none where nothing of this name was recorded or the variant did not run."""
    try:
        return results.recorded(variant, name)
    except NotMeasured:
        return ()


@dataclass(frozen=True)
class Claim:
    """A sentence that the results can refute. ``holds`` returns None when they cannot decide.

    Use ``labs.lab.at_least`` and ``at_most`` on intervals, so that noise gives None and not a guess.
    ``why`` explains the mechanism, and what to look at when the claim fails here.
    """

    text: str
    holds: Callable[[Results], bool | None]
    why: str


def at_least(interval: Interval, bound: float) -> bool | None:
    """True, False, or None when ``bound`` lies inside the interval."""
    if interval.low >= bound:
        return True
    return False if interval.high < bound else None


def at_most(interval: Interval, bound: float) -> bool | None:
    if interval.high <= bound:
        return True
    return False if interval.low > bound else None


def all_of(*verdicts: bool | None) -> bool | None:
    """Three-valued *and*: False beats None beats True."""
    if any(verdict is False for verdict in verdicts):
        return False
    return None if any(verdict is None for verdict in verdicts) else True


@dataclass(frozen=True)
class Lab:
    """One question. See the module's docstring for the order in which the parts are used.

    answer: the short answer, two or three sentences a reader can quote.
    columns: allocator modes the lab is measured under (each is a process of its own).
    seconds: how long a quick run's timed rounds may take in all, per column.
    memory_bytes: what a config needs, so that an impossible size is refused before it starts.
    """

    name: str
    question: str
    answer: str
    config: type
    variants: Callable[[Any], Sequence[Variant]]
    check: Callable[[Any, Mapping[str, object]], Sequence[Check]]
    predict: Callable[[Any, Machine], Sequence[Prediction]] = lambda config, machine: ()
    claims: Sequence[Claim] = ()
    figure: Callable[[Results], Sequence[Figure]] = lambda results: ()
    memory_bytes: Callable[[Any], float] = lambda config: 0.0
    derive: Callable[[Results], Sequence[Measurement]] = lambda results: ()
    columns: tuple[Allocator, ...] = ("default",)
    seconds: float = 20.0
    sources: tuple[str, ...] = ()


# --- configuration -------------------------------------------------------------------------------


def setting(
    default: Any,
    *,
    unit: str,
    help: str,
    quick: Any = None,
    full: Any = None,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Sequence[Any] = (),
) -> Any:
    """A field of a lab's Config: a value with its unit, its bounds and its size in a quick or full run."""
    metadata = dict(unit=unit, help=help, minimum=minimum, maximum=maximum, choices=tuple(choices))
    metadata["quick"] = default if quick is None else quick
    metadata["full"] = default if full is None else full
    return field(default=default, metadata=metadata)


def nearest(word: str, words: Sequence[str]) -> str:
    """``; did you mean 'x'?`` or the list of what there is."""
    close = difflib.get_close_matches(word, words, 1)
    return f"; did you mean {close[0]!r}?" if close else f"; there is {', '.join(words)}"


def _convert(name: str, text: Any, example: Any) -> Any:
    kind = type(example)
    if not isinstance(text, str):
        text = str(text)
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if kind is int:
            return int(text.replace("_", ""))
        if kind is float:
            return float(text)
        return text
    except (ValueError, KeyError):
        raise ValueError(f"{name} takes {kind.__name__}, not {text!r}") from None


def configure(lab: Lab, scale: Scale = "normal", overrides: Mapping[str, Any] | None = None) -> Any:
    """The lab's Config at a scale, with ``key=value`` overrides; ValueError names what is wrong."""
    known = {item.name: item for item in fields(lab.config)}
    values: dict[str, Any] = {}
    for name, item in known.items():
        default = None if item.default is MISSING else item.default
        values[name] = default if scale == "normal" else item.metadata.get(scale, default)
    for name, text in (overrides or {}).items():
        if name not in known:
            raise ValueError(f"{lab.name} has no setting {name!r}{nearest(name, list(known))}")
        values[name] = _convert(name, text, known[name].default)
    for name, item in known.items():
        value, rule = values[name], item.metadata
        unit = f" {rule['unit']}" if rule.get("unit") else ""
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{lab.name}: {name}={value} is not a finite number")
        if rule.get("minimum") is not None and value < rule["minimum"]:
            raise ValueError(f"{lab.name}: {name}={value} is below the minimum of {rule['minimum']}{unit}")
        if rule.get("maximum") is not None and value > rule["maximum"]:
            raise ValueError(f"{lab.name}: {name}={value} is above the maximum of {rule['maximum']}{unit}")
        if rule.get("choices") and value not in rule["choices"]:
            words = [str(choice) for choice in rule["choices"]]
            raise ValueError(f"{lab.name}: {name}={value!r} is unknown{nearest(str(value), words)}")
    return lab.config(**values)


def find(lab: Lab, config: Any, address: str) -> Variant:
    """The variant at ``group/name``; how another process finds what to run."""
    variants = {variant.address: variant for variant in lab.variants(config)}
    if address not in variants:
        raise ValueError(f"{lab.name} has no variant {address!r}{nearest(address, list(variants))}")
    return variants[address]


# --- running one lab by itself -------------------------------------------------------------------


OWN = ("quick", "full", "output", "help")
"""Options of every lab."""


def parser(lab: Lab, name: str) -> argparse.ArgumentParser:
    """Options derived from the lab's Config: a setting ``some_name`` is ``--some-name``, or
    ``--set-some-name`` where an option of every lab is called that."""
    found = argparse.ArgumentParser(prog=f"python -m labs.{name}", description=lab.question)
    size = found.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="scale", action="store_const", const="quick", help="smaller sizes")
    size.add_argument("--full", dest="scale", action="store_const", const="full", help="larger sizes")
    found.add_argument("--output", default=None, help="results file (default: results-LAB.json)")
    for item in fields(lab.config):
        option = item.name.replace("_", "-")
        text = f"{item.metadata['help']} (default {item.default})"
        found.add_argument(
            f"--set-{option}" if option in OWN else f"--{option}",
            dest=f"set_{item.name}",
            metavar=str(item.metadata["unit"]).upper().replace(" ", "_") or "VALUE",
            help=text.replace("%", "%%"),  # argparse formats it
        )
    return found


def main(name: str) -> None:
    """``python -m labs.NAME``: options derived from the lab's Config, run by the installed runner."""
    from importlib.metadata import entry_points

    from labs import load

    read = parser(load(name), name)
    options = vars(read.parse_args())
    overrides = {
        key[4:]: value for key, value in options.items() if key.startswith("set_") and value is not None
    }
    runners = {entry.value: entry for entry in entry_points(group="perflab.runner")}
    if len(runners) != 1:
        there = f"there are {len(runners)}: {', '.join(sorted(runners))}" if runners else "there is none"
        read.error(
            f"one installed distribution has to offer a runner (entry point perflab.runner), and {there}; "
            "pip install -e . where perflab lies"
        )
    (runner,) = runners.values()
    raise SystemExit(
        runner.load()(name, scale=options["scale"] or "normal", overrides=overrides, output=options["output"])
    )
