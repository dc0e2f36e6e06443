"""What the lab teaches, each sentence decided by what was counted or measured."""

from __future__ import annotations

from collections.abc import Callable

from labs.data_parallel import straggling
from labs.data_parallel.training import OURS
from labs.lab import Claim, Interval, Results, all_of, at_least, at_most, values_of

PAIRS = (("ddp", "torch_ddp"), ("zero1", "torch_zero1"), ("fsdp", "torch_fsdp"))
COMMUNICATION_BOUND = 1 / 3
"""Share of a step. Below a fifth no transport reaches 0.8, and none spares ranks the wait for each other."""
SINGLE_RUN = 0.05  # what is measured once is known within so much, at best


def _counted(results: Results, variant: str, key: str) -> float | None:
    values = values_of(results, variant, key)
    return values[-1] if values else None


def _equal(results: Results, variants: tuple[str, ...], keys: tuple[str, ...]) -> bool | None:
    verdicts: list[bool | None] = []
    for variant in variants:
        if not results.has(variant):
            return None
        wanted = {key: results.predicted(variant, key) for key in keys}
        for key, value in wanted.items():
            if value is not None:
                verdicts.append(_counted(results, variant, key) == value)
    return all_of(*verdicts) if verdicts else None


HELD_KEYS = ("parameters_B", "gradients_B", "optimizer_B", "activations_B")
SENT_KEYS = ("all_reduce_B", "all_gather_B", "reduce_scatter_B", "all_to_all_B")


def memory_is_predicted(results: Results) -> bool | None:
    return _equal(results, tuple(f"memory/{name}" for name in ("single", *OURS)), HELD_KEYS)


def fsdp_holds_a_share(results: Results) -> bool | None:
    """1/p of the single process's, and at most a row of padding and a count for each parameter more."""
    config = results.config
    verdicts: list[bool | None] = []
    for key in HELD_KEYS[:3]:
        whole = _counted(results, "memory/single", key)
        part = _counted(results, "memory/fsdp", key)
        if whole is None or part is None:
            return None
        share = Interval.exact(part * config.ranks / whole)
        verdicts += [at_least(share, 0.99), at_most(share, 1.05)]
    return all_of(*verdicts)


def bytes_are_predicted(results: Results) -> bool | None:
    return _equal(results, tuple(f"bytes/{name}" for name in OURS), SENT_KEYS)


def _enough_cores(results: Results) -> bool:
    return results.machine.cores >= results.config.ranks


def _ratio(new: str, base: str, bound: float) -> Callable[[Results], bool | None]:
    """new / base at most ``bound``; ranks that share a core decide nothing."""

    def holds(results: Results) -> bool | None:
        if not results.has(new, base) or not _enough_cores(results):
            return None
        return at_most(results.ratio(new, base), bound)

    return holds


def ours_is_not_slower(strategy: str) -> Callable[[Results], bool | None]:
    """Over gloo: 5 % are allowed, which is what such rounds resolve."""
    return _ratio(f"step/{strategy}_gloo", f"step/torch_{strategy}_gloo", 1.05)


def shm_is_faster(strategy: str) -> Callable[[Results], bool | None]:
    """Decided where communication is so large a part of PyTorch's step over gloo, as predicted."""
    new, base = f"step/{strategy}_shm", f"step/torch_{strategy}_gloo"

    def holds(results: Results) -> bool | None:
        compute, step = results.predicted("step/single"), results.predicted(base)
        if not results.has(new, base) or compute is None or step is None:
            return None
        bound = 1 - compute / step >= COMMUNICATION_BOUND
        return _ratio(new, base, 0.8)(results) if bound else None

    return holds


def threads_gain_nothing(results: Results) -> bool | None:
    new, base = "replicas/data_parallel", "replicas/one_replica"
    return at_least(results.ratio(new, base), 0.95) if results.has(new, base) else None


def local_sgd_arrives_sooner(results: Results) -> bool | None:
    """Both to the target, once each: a difference within ``SINGLE_RUN`` decides nothing."""
    addresses = [f"straggler/{name}" for name in straggling.WAYS]
    synchronous, local = (_counted(results, address, "target_s") for address in addresses)
    if synchronous is None or local is None:
        return None
    ratio = local / synchronous
    return at_most(Interval(ratio, ratio * (1 - SINGLE_RUN), ratio * (1 + SINGLE_RUN)), 1.0)


CLAIMS = (
    Claim(
        "What a rank holds is predicted to the byte: parameters, gradients, optimizer state, activations.",
        memory_is_predicted,
        "All four follow from shapes alone. If it fails: padding, or a storage that is held twice.",
    ),
    Claim(
        "Under FSDP a rank holds 1/p of parameters, gradients and optimizer state.",
        fsdp_holds_a_share,
        "Rows are split, the last rank's padded; each gradient has a count besides. Activations are not "
        "sharded: they belong to the rank's own batch.",
    ),
    Claim(
        "What a rank communicates in a step is predicted to the byte.",
        bytes_are_predicted,
        "All-reduce is as much as a reduce-scatter and an all-gather; FSDP gathers once more, for backward.",
    ),
    *(
        Claim(
            f"Over gloo our {label} is not slower than PyTorch's.",
            ours_is_not_slower(name),
            "The same bytes over the same wire: what differs is the work for each call, and what overlaps.",
        )
        for name, label in (("ddp", "DDP"), ("fsdp", "FSDP"))
    ),
    *(
        Claim(
            f"Where a step is bound by communication our {label} over shm takes at most 0.8 of the time of "
            "PyTorch's over gloo.",
            shm_is_faster(name),
            "Processes of one host need no sockets. Only communication can be saved, not the wait for the "
            "slower rank: undecidable where less than a third of PyTorch's step over gloo is predicted to be "
            "communication.",
        )
        for name, label in (("ddp", "DDP"), ("zero1", "ZeRO-1"), ("fsdp", "FSDP"))
    ),
    Claim(
        "Replicas in threads of one process are not faster than one replica with all cores.",
        threads_gain_nothing,
        "The interpreter's lock hands every operator of every replica through one queue, and rank 0 copies "
        "the model out and the gradients in. One process for each replica has neither.",
    ),
    Claim(
        "With ranks that are late independently local SGD reaches the target loss sooner.",
        local_sgd_arrives_sooner,
        "Synchronous steps wait for the latest rank each time; sums of many delays differ less between "
        "ranks. If it fails: it needed more steps than waiting cost, or one rank is always late.",
    ),
)
