"""May a measurement taken here be trusted, right now? An A/A test, and what would spoil a run."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import environment, stats
from bench.rounds import Timed, pairs, time_together

GOOD, WARNING, BAD = "good", "warning", "bad"


@dataclass(frozen=True)
class Finding:
    """level: good, warning (a measurement is less sharp) or bad (it would be wrong)."""

    level: str
    subject: str
    text: str


@dataclass(frozen=True)
class SelfTest:
    """The same function timed twice as if it were two: what looks like a difference is noise."""

    comparison: stats.Comparison
    pairs: int
    seconds: float

    @property
    def resolvable(self) -> float:
        """The smallest difference (a share) that a comparison of this length can tell right now."""
        return max(self.comparison.high - 1, 1 - self.comparison.low, 0.0) + stats.TOLERANCE


def self_test(seconds: float = 1.8) -> SelfTest:
    """A/A test with work of about 0.3 ms on one thread, in pure NumPy."""
    import numpy as np

    data = np.random.default_rng(0).standard_normal((64, 1000))

    def work() -> object:
        return (data - data.mean(1, keepdims=True)) * 2.0

    start = time.perf_counter()
    timed = {"base": Timed(work), "new": Timed(lambda: work())}
    time_together(timed, seconds)
    both = pairs(timed["base"], timed["new"])
    return SelfTest(stats.compare_pairs(*both), len(both[0]), time.perf_counter() - start)


def examine() -> list[Finding]:
    """Everything but the A/A test; needs no calibration."""
    findings = [Finding(BAD, "imports", line) for line in environment.shadowed_packages()]
    if findings:
        return findings  # with the wrong packages nothing else here would be true
    findings = [_load(), _governor(), _threads(), *_quota(), _allocator(), _huge_pages()]
    findings += [
        Finding(BAD, "imports", f"{line}; uninstall it, or one of the two will be imported by accident")
        for line in environment.foreign_packages()
    ]
    findings += [Finding(WARNING, "imports", line) for line in environment.names_taken(Path.cwd())]
    if not any(finding.subject == "imports" for finding in findings):
        findings.append(Finding(GOOD, "imports", "kernels, parallel, labs and bench are perflab's own"))
    return findings


def _load() -> Finding:
    import psutil

    from kernels.cores import usable_cores

    cores, load = usable_cores(), environment.load_average()
    busy = psutil.cpu_percent(0.3) / 100 * (os.cpu_count() or 1)
    text = f"{busy:.1f} of {os.cpu_count()} cores busy with other work, load average {load:.1f}"
    if busy < 0.15 * cores:
        return Finding(GOOD, "load", text)
    if busy < 0.6 * cores:
        return Finding(WARNING, "load", f"{text}: intervals will be wider; close what is running")
    return Finding(BAD, "load", f"{text}: every core is taken; absolute times are worth nothing now")


def _governor() -> Finding:
    governor = environment.governor()
    if not governor:
        return Finding(
            GOOD, "frequency", "no frequency governor is visible (a virtual machine, or not Linux)"
        )
    if governor == "performance":
        return Finding(GOOD, "frequency", "governor 'performance'")
    return Finding(
        WARNING, "frequency", f"governor {governor!r}: the clock follows the load; 'performance' is steadier"
    )


def _threads() -> Finding:
    from labs.machine import usable_cores

    cores = usable_cores()
    found = []
    for name in environment.THREAD_VARIABLES[:-1]:
        value = os.environ.get(name, "")
        if value and not value.isdigit():
            found.append((WARNING, f"{name}={value!r} is no number of threads"))
        elif value and int(value) > cores:
            found.append((BAD, f"{name}={value} on {cores} usable cores: threads take turns; unset it"))
        elif value and int(value) < cores:
            found.append((WARNING, f"{name}={value}: {cores - int(value)} of {cores} cores stay idle"))
    if found:
        worst = BAD if any(level == BAD for level, _ in found) else WARNING
        return Finding(worst, "threads", "; ".join(text for _, text in found))
    if cores < (os.cpu_count() or 1):
        return Finding(GOOD, "threads", f"{cores} of {os.cpu_count()} cores are usable here (affinity)")
    return Finding(GOOD, "threads", f"libraries choose their own number for {cores} cores")


def _quota() -> list[Finding]:
    """A limit on CPU time by control groups (``--cpus`` of a container), where there is one."""
    from kernels.cores import affinity, cpu_quota

    quota, cores = cpu_quota(), len(affinity())
    if quota is None:
        return []
    text = f"control groups leave {quota:g} cores' time on {cores} cores"
    if quota >= cores:
        return [Finding(GOOD, "quota", text)]
    whole = max(1, int(quota))
    return [
        Finding(
            WARNING,
            "quota",
            f"{text}: libraries start {cores} threads, which are stopped together when the time is used up; "
            f"pin the process to {whole} of them (taskset, --cpuset-cpus)",
        )
    ]


def _allocator() -> Finding:
    if os.environ.get("LD_PRELOAD"):
        return Finding(
            WARNING, "allocator", f"LD_PRELOAD={os.environ['LD_PRELOAD']}: columns may not mean glibc's modes"
        )
    return Finding(
        GOOD, "allocator", f"glibc mode of this process: {environment.allocator_mode()}; runs use both"
    )


def _huge_pages() -> Finding:
    mode = environment.read_text("/sys/kernel/mm/transparent_hugepage/enabled")
    return Finding(GOOD, "huge pages", mode or "not visible")


def to_json(findings: list[Finding], test: SelfTest) -> dict[str, Any]:
    return {
        "findings": [asdict(finding) for finding in findings],
        "self_test": {
            **asdict(test.comparison),
            "pairs": test.pairs,
            "seconds": test.seconds,
            "resolvable": test.resolvable,
        },
    }


def print_examination(findings: list[Finding], test: SelfTest) -> None:
    from rich.console import Console

    console = Console()
    sign = {GOOD: ("✓", "green"), WARNING: ("!", "yellow"), BAD: ("✗", "red")}
    for finding in findings:
        mark, style = sign[finding.level]
        console.print(f"{mark} {finding.subject}: {finding.text}", style=style, markup=False, soft_wrap=True)
    comparison = test.comparison
    mark, style = sign[BAD if comparison.verdict in ("faster", "slower") else GOOD]
    console.print(
        f"{mark} A/A test: the same work twice gives {comparison.ratio:.4f}x [{comparison.low:.4f}, "
        f"{comparison.high:.4f}] over {test.pairs} pairs in {test.seconds:.1f} s: {comparison.verdict}",
        style=style,
        markup=False,
        soft_wrap=True,
    )
    console.print(
        f"Differences of {test.resolvable * 100:.1f} % and more can be told here now.", style="bold"
    )
