"""The pictures: times of each way beside what was predicted; compile and run time apart; memory."""

from __future__ import annotations

from collections.abc import Sequence

from labs.figure import NAN, Bars, Figure, measured_and_predicted
from labs.jax_transforms import batched, derivatives, dispatch, recurrent, sample_gradients, softmax, training
from labs.jax_transforms.claims import counted
from labs.lab import Results

TITLES = {
    dispatch.GROUP: "A product of 686 FLOPs, and one of 1024",
    batched.GROUP: "Many 8 x 8 products",
    sample_gradients.GROUP: "The gradient of every sample",
    training.GROUP: "A training step of an MLP",
    recurrent.GROUP: "A recurrent network, forward",
    recurrent.GRADIENT: "Its gradient",
    derivatives.JACOBIAN: "A Jacobian of few inputs and many outputs",
    derivatives.HESSIAN: "A Hessian",
    softmax.GROUP: "Softmax, and the same as an interpreted Pallas kernel",
}


def figure(results: Results) -> Sequence[Figure]:
    found: list[Figure | None] = [_stages(results)]
    found += [
        measured_and_predicted(results, results.variants(group), title, log=True)
        for group, title in TITLES.items()
    ]
    found.append(_memory(results))
    return [each for each in found if each is not None]


def _stages(results: Results) -> Figure | None:
    """Tracing, compiling and running the recurrent network, apart."""
    addresses = [
        address
        for address in results.variants(recurrent.GROUP)
        if counted(results, address, "compile_s") is not None
    ]
    if not addresses:
        return None
    names = {"trace and lower": "trace_s", "compile": "compile_s"}
    series = {
        label: [counted(results, address, name) or NAN for address in addresses]
        for label, name in names.items()
    }
    series["compile, predicted"] = [results.predicted(address, "compile_s") or NAN for address in addresses]
    series["run"] = [results.seconds(address).value for address in addresses]
    return Bars(
        "What a recurrent network costs once, and at each call",
        "time (s)",
        [address.partition("/")[2] for address in addresses],
        series,
        log=True,
        note=f"{results.config.steps} steps; scan compiles one of them, a loop in Python all",
    )


def _memory(results: Results) -> Figure | None:
    """Temporary memory of compiled programs with and without checkpoint."""
    groups = {training.GROUP: ("step", "checkpoint"), recurrent.GRADIENT: ("scan", "checkpoint")}
    addresses = [f"{group}/{name}" for group, names in groups.items() for name in names]
    addresses = [address for address in addresses if counted(results, address, "temporary_B") is not None]
    if not addresses:
        return None
    return Bars(
        "Temporary memory without and with jax.checkpoint",
        "memory (KiB)",
        addresses,
        {"temporary": [(counted(results, address, "temporary_B") or 0.0) / 1024 for address in addresses]},
        note="as the compiled program says (memory_analysis)",
    )
