"""What the lab trains beside the model itself: students, adapters that heal a pruned model, an early exit.

``python -m labs.precision.training`` (``make model``) trains all of it by the full recipe, once, and goes on
where it was stopped. Without, ``family`` trains by the short one, within a limit.

Sources: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", section 2 (soft targets,
temperature squared); Hu et al. 2021 (LoRA).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from labs.home import home
from labs.models.gpt import GPT
from labs.models.text import Batches, standard_library
from labs.models.trained import (
    FULL,
    Progress,
    Recipe,
    Trained,
    cross_entropy,
    fit,
    gpt,
    load,
    path_of,
    save,
)
from labs.precision.compress import adapted, merged, structured
from labs.precision.early_exit import EarlyExit
from labs.precision.sizes import ADAPTER_RANK, KEEP, THRESHOLD, student_of

TEMPERATURE = 2.0
SHARES = {"gpt": 0.45, "student": 0.16, "alone": 0.09, "adapters": 0.1, "tuned": 0.12, "exit": 0.08}
"""Of the time, where it is limited."""


@dataclass(frozen=True)
class Family:
    """One trained model and what was made of it by training.

    student: distilled from the base. alone: as large, trained as long, without a teacher. healed: the base
    with half its heads and neurons, and LoRA that was trained to heal it, merged. tuned: the whole base with
    LoRA of the same rank, trained as long and merged: what the training alone gives.
    whole: no training was ended by the limit.
    """

    base: Trained
    student: GPT
    alone: GPT
    healed: GPT
    tuned: GPT
    exit: EarlyExit
    whole: bool


def family(recipe: Recipe, limit_seconds: float = math.inf, progress: Progress | None = None) -> Family:
    """What is not on file is trained, within the limit in all; what was trained to its end is kept."""
    return _family(recipe, home(), limit_seconds, progress)


@lru_cache(maxsize=2)
def _family(recipe: Recipe, kept_in: Path, limit_seconds: float, progress: Progress | None) -> Family:
    """kept_in: for the cache alone: the files of another folder hold another model."""
    say = progress or (lambda line: None)
    say(f"the model ({recipe.name})")
    base = gpt(recipe.name, limit_seconds * SHARES["gpt"], progress)
    model = base.model.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed + 1)
        student, alone = GPT(student_of(recipe.model)), GPT(student_of(recipe.model))
        alone.load_state_dict(student.state_dict())  # the same start
        smaller, larger = (adapted(each, ADAPTER_RANK) for each in (structured(model, KEEP), model))
        early = EarlyExit(model, recipe.model.layers // 2, THRESHOLD)
    parts: dict[str, dict[str, nn.Parameter]] = {
        "student": dict(student.named_parameters()),
        "alone": dict(alone.named_parameters()),
        "adapters": _of_adapters(smaller),
        "tuned": _of_adapters(larger),
        "exit": {name: p for name, p in early.named_parameters() if not name.startswith("model.")},
    }
    losses: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
        "student": lambda tokens, targets: distillation(student(tokens), model(tokens), targets),
        "alone": lambda tokens, targets: cross_entropy(alone(tokens), targets),
        "adapters": lambda tokens, targets: cross_entropy(smaller(tokens), targets),
        "tuned": lambda tokens, targets: cross_entropy(larger(tokens), targets),
        "exit": lambda tokens, targets: cross_entropy(early.at_exit(tokens)[1], targets),
    }
    kept = base.steps == recipe.steps  # what is made of a model that is not kept is of no use later
    whole = kept
    for part, parameters in parts.items():
        if kept and _found(path_of(recipe, part), parameters):
            continue
        steps = recipe.steps // (2 if part in ("student", "alone") else 8)
        say(f"{part}: {steps} steps")
        done = _train(recipe, parameters, losses[part], steps, limit_seconds * SHARES[part], progress)
        if kept and done == steps:
            save(path_of(recipe, part), {name: p.detach() for name, p in parameters.items()}, {"steps": done})
        whole = whole and done == steps
    for trained in (student, alone, smaller, larger, early):
        trained.eval().requires_grad_(False)
    return Family(base, student, alone, merged(smaller), merged(larger), early, whole)


def _of_adapters(model: GPT) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if name.endswith((".down", ".up"))}


def _found(path: Path, parameters: dict[str, nn.Parameter]) -> bool:
    """Whether the file has these parameters; they then have its values."""
    tensors, _ = load(path) or ({}, {})
    if set(tensors) != set(parameters):
        return False
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return True


def _train(
    recipe: Recipe,
    parameters: dict[str, nn.Parameter],
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    steps: int,
    limit_seconds: float,
    progress: Progress | None,
) -> int:
    """On batches that the base has not been trained with in this order."""
    batches = Batches(standard_library().train, recipe.batch, recipe.length, recipe.seed + 1)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    rate = recipe.learning_rate

    def one(step: int) -> torch.Tensor:
        return loss(*batches[step])

    return fit(parameters.values(), one, steps, rate, limit_seconds, progress)


def distillation(student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Half the cross-entropy with the text, half T^2 KL(teacher || student) of the logits divided by T."""
    soft, wanted = (F.log_softmax(logits.flatten(0, 1) / TEMPERATURE, -1) for logits in (student, teacher))
    divergence = F.kl_div(soft, wanted, reduction="batchmean", log_target=True)
    return 0.5 * cross_entropy(student, targets) + 0.5 * TEMPERATURE**2 * divergence


def main() -> None:
    made = family(FULL, progress=lambda line: print(line, flush=True))
    print(f"{made.base.origin}: {path_of(FULL).parent}")


if __name__ == "__main__":
    main()
