"""What the lab trains beside the model itself: students, adapters that heal a pruned model, an early exit.

``python -m labs.precision.training`` (``make model``) trains all of it by the full recipe, once. Without,
``family`` trains by the short one, within a limit.

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

from labs.models.gpt import GPT
from labs.models.text import Batches, standard_library
from labs.models.trained import (
    FULL,
    Progress,
    Recipe,
    Trained,
    chosen,
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
SHARES = {"base": 0.45, "student": 0.2, "alone": 0.1, "adapters": 0.15, "exit": 0.1}
"""Of the time, where it is limited."""


@dataclass(frozen=True)
class Family:
    """One trained model and what was made of it by training.

    student: distilled from the base. alone: as large, trained as long, without a teacher. adapted: the base
    with half its heads and neurons, and LoRA that was trained to heal it; ``healed`` has it merged.
    """

    base: Trained
    student: GPT
    alone: GPT
    adapted: GPT
    healed: GPT
    exit: EarlyExit


def family(name: str = "kept", limit_seconds: float = math.inf, progress: Progress | None = None) -> Family:
    """Of ``chosen(name)``; what is not on file is trained, within the limit in all, and kept if that
    sufficed."""
    return _family(chosen(name), path_of(chosen(name), "precision"), limit_seconds, progress)


@lru_cache(maxsize=2)
def _family(recipe: Recipe, path: Path, limit_seconds: float, progress: Progress | None) -> Family:
    say = progress or (lambda line: None)
    say(f"the model ({recipe.name})")
    base = gpt(recipe.name, limit_seconds * SHARES["base"], progress)
    model = base.model.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed + 1)
        student, alone = GPT(student_of(recipe.model)), GPT(student_of(recipe.model))
        alone.load_state_dict(student.state_dict())  # the same start
        smaller = adapted(structured(model, KEEP), ADAPTER_RANK)
        early = EarlyExit(model, recipe.model.layers // 2, THRESHOLD)
    parts: dict[str, dict[str, nn.Parameter]] = {
        "student": dict(student.named_parameters()),
        "alone": dict(alone.named_parameters()),
        "adapters": {name: p for name, p in smaller.named_parameters() if name.endswith((".down", ".up"))},
        "exit": {name: p for name, p in early.named_parameters() if not name.startswith("model.")},
    }
    kept = load(path)
    if kept is None:
        losses = {
            "student": lambda tokens, targets: distillation(student(tokens), model(tokens), targets),
            "alone": lambda tokens, targets: cross_entropy(alone(tokens), targets),
            "adapters": lambda tokens, targets: cross_entropy(smaller(tokens), targets),
            "exit": lambda tokens, targets: cross_entropy(early.at_exit(tokens)[1], targets),
        }
        whole = base.steps == recipe.steps
        for part, loss in losses.items():
            steps = recipe.steps // (2 if part in ("student", "alone") else 8)
            say(f"{part}: {steps} steps")
            done = _train(recipe, parts[part], loss, steps, limit_seconds * SHARES[part], progress)
            whole = whole and done == steps
        if whole:
            named = {f"{part}.{name}": p.detach() for part in parts for name, p in parts[part].items()}
            save(path, named, {"steps": recipe.steps})
    else:
        with torch.no_grad():
            for part, parameters in parts.items():
                for name, parameter in parameters.items():
                    parameter.copy_(kept[0][f"{part}.{name}"])
    for trained in (student, alone, smaller, early):
        trained.eval().requires_grad_(False)
    return Family(base, student, alone, smaller, merged(smaller), early)


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
    made = family(FULL.name, progress=lambda line: print(line, flush=True))
    print(f"{made.base.origin}: {path_of(FULL)}")


if __name__ == "__main__":
    main()
