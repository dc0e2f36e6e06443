"""A profile as the figures that the rules ask for: shares of time, rates, and what they are shares of.

They come from the trace (any profiler's), from what our recorder counts of the process beside it, and from
the constants of this machine. Each of the last two may be absent: then the figures are None, and ``lacks``
says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from bench.diagnosis.counted import Process, counted, number, places, process_of
from bench.diagnosis.timeline import CALL_NS, timeline, types_are_told
from bench.traces.events import Job, Kind, Trace
from bench.traces.roof import roof_of

if TYPE_CHECKING:
    from labs.machine import Machine

NOT_COUNTED = (
    "page faults, context switches, threads and the memory limit: the report was not recorded by perflab "
    "profile, so allocator, oversubscription and memory_capacity cannot be seen"
)
NO_MACHINE = (
    "this machine's limits: the report is of another machine, or perflab calibrate has not run, so "
    "compute_precision and the cost of page faults cannot be judged"
)
OF_HOSTS = (
    "a device's memory, and what the host's allocator and threads cost it: memory_capacity, allocator and "
    "oversubscription are judged of jobs without a device"
)
NO_TYPES = (
    "how long a device multiplied in which type: the report names several, so compute_precision cannot be "
    "judged"
)
NO_OPERATORS = (
    "operations: the report has functions alone, so whether Python, calls, memory or arithmetic hold the job "
    "up cannot be told"
)
CALLS_OF_AN_OPERATOR = 1.64
"""Plain calls of torch that an operator of a training step costs, autograd's part in it: 1.3 us where one
took 0.79."""


@dataclass(frozen=True)
class Facts:
    """Shares are of the time of the steps, means over ranks, and lie in 0 to 1: of what several
    threads do at once each counts its part.

    step_s: a typical step.
    input, gaps, calls: no operator runs and the main thread waits for input; does something else for long;
        goes from one operator to the next.
    calling: what a call costs for each operator, over the CPU time of the steps.
    small, pointwise, products: own time of operators that are small; pass over memory; multiply matrices (the
        last two on a device: of the kernels they launch).
    wide_products: of these in float32 or float64. flops_per_s: of products, by their time.
    exposed: only communication. copies: a device only copies. waits, launches: a device has nothing to do
        because the host had waited for it; because the host is busy launching.
    late: what the latest rank keeps the others waiting; late_rank: who, -1 nobody.
    system: of the CPU seconds those in the kernel. fault_share, switch_share: seconds of all page faults and
        of all switches of threads, by this machine's constants, over the CPU seconds. A switch costs as much
        as one way of a message between processes: system calls, the switch, and what it leaves of the caches.
    faults_per_s, switches_per_s (of threads): by CPU second.
    threads: among which the ranks of a host divide their operations. cores: that they may use. load: the
        machine's average.
    memory: what a step takes of what is left of the limit; memory_grown: it is what the process grew by, as
        nobody recorded what a step takes.
    faster: peak of a 16-bit type over float32's, on this machine.
    places: where the program's own code stood most often.
    lacks: what the profile or the machine does not tell, and what therefore cannot be seen.
    """

    ranks: int = 1
    on_device: bool = False
    steps: int = 0
    step_s: float = 0.0
    input: float = 0.0
    gaps: float = 0.0
    calls: float = 0.0
    calling: float = 0.0
    small: float = 0.0
    operators_per_s: float = 0.0
    pointwise: float = 0.0
    products: float = 0.0
    wide_products: float = 0.0
    flops_per_s: float = 0.0
    exposed: float = 0.0
    waits: float = 0.0
    copies: float = 0.0
    launches: float = 0.0
    late: float = 0.0
    late_rank: int = -1
    system: float | None = None
    faults_per_s: float | None = None
    fault_share: float | None = None
    switches_per_s: float | None = None
    switch_share: float | None = None
    threads: int | None = None
    cores: int | None = None
    load: float | None = None
    memory: float | None = None
    memory_B: float | None = None
    memory_limit_B: float | None = None
    memory_grown: bool = False
    faster: float | None = None
    places: str = ""
    lacks: Sequence[str] = field(default_factory=tuple)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Facts:
        """What ``to_json`` gave; ValueError for an entry of another type."""
        given = {one.name: data[one.name] for one in fields(cls) if one.name in data}
        for name, value in given.items():
            texts = name in ("places", "lacks")
            if isinstance(value, str | list | tuple) != texts or isinstance(value, dict):
                raise ValueError(f"{name} is {value!r}")
        return cls(**given)

    def to_json(self) -> dict[str, Any]:
        """Numbers to four digits."""
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        return {
            name: float(f"{value:.4g}") if isinstance(value, float) else value
            for name, value in found.items()
        } | {"lacks": list(self.lacks)}


def facts_of(job: Job) -> Facts:
    """Of all traces of a job. ValueError: none has places in time, or none holds an event."""
    traces = [trace for trace in job.traces if trace.timed and len(trace.events)]
    if not traces:
        raise ValueError(
            f"{job.source} says how long functions took but not when: a bottleneck shows in a timeline; "
            "record one with perflab profile, torch.profiler or jax.profiler"
        )
    of_steps = [process_of(trace) for trace in traces]
    machine = _machine(traces[0])
    plain = machine.get("torch_call_s") if machine is not None else None
    call_ns = 1e9 * CALLS_OF_AN_OPERATOR * plain if plain else CALL_NS
    found = [timeline(*each, call_ns) for each in zip(traces, of_steps, strict=True)]
    numbers: dict[str, Any] = {name: sum(one[name] for one in found) / len(found) for name in found[0]}
    processes = counted(traces, of_steps)
    on_device = bool(traces[0].on_device().any())
    constants = _constants(machine, on_device, processes, of_steps[0])
    lacks = {
        NOT_COUNTED: not processes and not on_device,
        OF_HOSTS: on_device,
        NO_TYPES: not all(types_are_told(trace) for trace in traces),
        NO_MACHINE: not constants,
        NO_OPERATORS: not on_device and not any((t.events.kind == Kind.OPERATOR).any() for t in traces),
    }
    return Facts(
        ranks=len(traces),
        on_device=on_device,
        steps=int(numbers.pop("steps")),
        **numbers,
        **_lateness(job, [one["exposed"] for one in found]),
        **processes,
        **constants,
        places=places(of_steps[0]),
        lacks=[text for text, lacking in lacks.items() if lacking],
    )


def _lateness(job: Job, exposed: Sequence[float]) -> dict[str, Any]:
    """What the latest rank costs the others. exposed: of each trace.

    All take part in the same exchanges, so that what one rank communicates less than another is what the
    other waits for it; and where ranks can be matched collective by collective, what that says for certain.
    """
    if len(exposed) < 2 or len(exposed) < len(job.traces):
        return {}
    from bench.traces.ranks import compare_ranks

    least = min(range(len(exposed)), key=lambda place: exposed[place])
    found = {"late": max(exposed) - exposed[least], "late_rank": job.traces[least].rank}
    late = compare_ranks(job).late
    if late and late[0].cost is not None:
        cost = 1.0 - 1.0 / max(late[0].cost.ratio, 1.0)
        if cost > found["late"]:
            found = {"late": cost, "late_rank": late[0].rank}
    return found


def _machine(trace: Trace) -> Machine | None:
    """This machine, where the trace was recorded on it and it was calibrated."""
    from labs.machine import load_cached

    return load_cached() if roof_of(trace) is not None else None


def _constants(
    machine: Machine | None, on_device: bool, counts: Mapping[str, Any], process: Process
) -> dict[str, Any]:
    """What the machine's limits say of this job; empty where they are not known."""
    if machine is None:
        return {}
    computes, suffix = (machine.gpu, "all") if on_device else (machine, "1")
    if computes is None:
        return {}
    wide = computes.peak("float32", unit="matrix", threads=0 if on_device else 1)
    names = [f"matrix_{name}_{suffix}_flops" for name in ("bfloat16", "float16")]
    found = {"faster": max(1.0, max(computes.get(name) or 0.0 for name in names) / wide)}
    if counts:
        page = number(process.get("page_B")) or 4096.0
        found["fault_share"] = counts["faults_per_s"] * page * (machine.get("page_fault_s_per_byte") or 0.0)
        found["switch_share"] = counts["switches_per_s"] * (machine.get("process_switch_s") or 0.0)
    return found
