"""Lines of compiled programs that explain what surprises, and what the lab says to mistakes.

``excerpts(config)`` compiles small programs and returns their telling lines: data for a report, a few seconds
of work. Everything else about them (counts, FLOPs, memory) is recorded with the variants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from labs.jax_transforms import misuse, networks, recurrent, sharding, softmax, training
from labs.jax_transforms.arrays import random, to_jax
from labs.jax_transforms.config import Config
from labs.lab import Recorder

WIDTH = 150  # characters of a line that are kept: types and names come first


@dataclass(frozen=True)
class Excerpt:
    """title: what it is of. explains: the surprise, and what to see. text: lines of a fixed-width face."""

    title: str
    explains: str
    text: str


def excerpts(config: Config) -> Sequence[Excerpt]:
    """All of them, in the order of the lab."""
    found = [_batched(), _donated(config), _checkpoint(config), *_loops(config), _interpreted(config)]
    return [*found, *_sharded(config), *_messages()]


def tell(recorder: Recorder, config: Config) -> None:
    """Hand them to a recorder as texts."""
    for each in excerpts(config):
        recorder.text(each.title, f"{each.explains}\n\n{each.text}")


def telling(hlo: str, *words: str, most: int = 6) -> str:
    """The lines with one of the words, cut to their beginnings; how many more there are."""
    lines = [line.strip() for line in hlo.splitlines() if any(word in line for word in words)]
    shown = [f"{line[:WIDTH]} ..." if len(line) > WIDTH else line for line in lines[:most]]
    if len(lines) > most:
        shown.append(f"... and {len(lines) - most} more such lines")
    return "\n".join(shown) or f"(no line has {' or '.join(words)})"


def _lowered(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    import jax

    return jax.jit(function, **options).lower(*arguments)


def _batched() -> Excerpt:
    import jax
    import jax.numpy as jnp

    left, right = to_jax(random(1, (5, 8, 8), (5, 8, 8)))
    hlo = _lowered(jax.vmap(jnp.matmul), left, right).compile().as_text()
    return Excerpt(
        "vmap of a product (HLO)",
        "No loop: vmap turned the product into one with a batch dimension.",
        telling(hlo, " dot("),
    )


def _donated(config: Config) -> Excerpt:
    weights = to_jax(networks.parameters(training.sizes(config)))
    inputs, targets = to_jax(networks.batch(training.sizes(config), config.batch))
    step = training.jax_step(training.jax_loss())
    hlo = _lowered(step, weights, inputs, targets, donate_argnums=0).compile().as_text()
    begin = hlo.find("input_output_alias")
    line = hlo[begin : hlo.find("}, entry", begin) + 1] if begin >= 0 else "(no input_output_alias)"
    return Excerpt(
        "A donated training step (HLO, first line)",
        "Output 1 is argument 0's memory and so on: the new parameters are written over the old ones.",
        line[: 4 * WIDTH],
    )


def _checkpoint(config: Config) -> Excerpt:
    weights = to_jax(networks.parameters(training.sizes(config)))
    inputs, targets = to_jax(networks.batch(training.sizes(config), config.batch))
    rows = []
    for name in ("plain", "checkpoint"):
        step = training.jax_step(training.jax_loss(name == "checkpoint"))
        lowered = _lowered(step, weights, inputs, targets)
        program = lowered.compile()
        before, after = lowered.as_text(), program.as_text()
        rows.append(
            f"{name:12}{before.count('stablehlo.dot_general'):10}{before.count('optimization_barrier'):10}"
            f"{after.count(' dot('):10}{after.count('opt-barrier'):10}"
        )
    head = f"{'':12}{'products':>10}{'barriers':>10}{'products':>10}{'barriers':>10}"
    return Excerpt(
        "jax.checkpoint of an MLP's layers, before and after XLA",
        "Lowered (first two columns), the layers' products are there again behind barriers; compiled for a "
        "CPU (last two), the barriers are gone and each product is computed once. It saves no memory "
        "here and costs some: see the picture.",
        "\n".join((head, *rows)),
    )


def _loops(config: Config) -> list[Excerpt]:
    given = to_jax(recurrent.inputs(config))
    found = []
    for name, explains in (
        ("scan", "One while loop: its body is compiled once, whatever the number of steps."),
        ("unrolled", "Every step has products and kernels of its own: that is what takes long to compile."),
    ):
        program = _lowered(recurrent.last_state(name, config.steps), *given)
        hlo = program.as_text()
        found.append(
            Excerpt(
                f"{config.steps} recurrent steps: {name} (StableHLO)",
                explains,
                telling(hlo, "stablehlo.while", "stablehlo.dot_general", most=4),
            )
        )
    return found


def _interpreted(config: Config) -> Excerpt:
    scores = to_jax(random(51, (config.side, config.side)))[0]
    hlo = _lowered(softmax.pallas_softmax, scores).compile().as_text()
    return Excerpt(
        "A Pallas kernel in interpret mode (HLO)",
        "The grid is a while loop. Its turn copies all the scores twice, for the sake of one block: that is "
        "what takes the time.",
        telling(hlo, f"f32[{config.side},{config.side}]{{1,0}} copy(", " while(", most=8),
    )


def _sharded(config: Config) -> list[Excerpt]:
    found = []
    for layout, told in sharding.over_devices(config.devices).items():
        lines = "\n".join(f"{line[:WIDTH]} ..." for line in told["lines"])
        found.append(
            Excerpt(
                f"A product over {config.devices} devices, cut by {layout} (HLO)",
                f"Needs {' and '.join(told['kinds']) or 'no collective'}: {told['bytes']} B of payload.",
                lines or "(no collective)",
            )
        )
    return found


def _messages() -> list[Excerpt]:
    return [
        Excerpt(f"What the lab says to {name.replace('_', ' ')}", "A TransformError.", misuse.message(name))
        for name in misuse.CASES
    ]
