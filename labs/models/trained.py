"""A GPT trained on the standard library's source, kept between runs, so that labs judge quality on a model
that has learned something.

    make model     trains it for minutes, once: every lab then loads it

Where it is absent, ``gpt()`` trains a shorter and smaller one within a limit of seconds, keeps that too, and
says so in ``origin``. Training is seeded: steps, batches and initial values are the same at every call.
Importing this file loads no torch, so that a lab can say which model it will use before anything runs.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labs.machine import home
from labs.models.configuration import GPTConfig

if TYPE_CHECKING:
    import torch

    from labs.models.gpt import GPT

FORMAT = 1  # of the kept files; another number is trained anew
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the training gives.

    steps: of ``batch`` windows of ``length`` bytes each, as long as the model's context: a learned position
    that no window reaches would stay random. learning_rate: the highest, after a linear warm-up of
    a twentieth of the steps; it falls by a cosine to a tenth (Loshchilov and Hutter 2017).
    """

    name: str
    model: GPTConfig
    steps: int
    batch: int
    length: int
    learning_rate: float
    seed: int = 0


FULL = Recipe("full", GPTConfig(width=128, heads=4, layers=6, context=256), 1000, 8, 256, 2e-3)
"""1.3 million parameters, 2 million bytes of text: some minutes on two cores."""
SHORT = Recipe("short", GPTConfig(width=128, heads=4, layers=2, context=128), 200, 8, 128, 4e-3)
"""0.4 million parameters, for a lab that finds no other."""
TINY = Recipe("tiny", GPTConfig(width=64, heads=4, layers=2, context=64), 40, 8, 64, 4e-3)
"""For tests: a second."""
RECIPES = {recipe.name: recipe for recipe in (FULL, SHORT, TINY)}


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode. origin: where it comes from, a sentence. steps: that it was trained for."""

    model: GPT
    recipe: Recipe
    origin: str
    steps: int


def path_of(recipe: Recipe, part: str = "gpt") -> Path:
    """Where what a recipe gives is kept; another recipe, or another Python's text, is another file."""
    text = f"{FORMAT} {part} {recipe} {platform.python_version()}"
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return home() / "models" / f"{part}-{recipe.name}-{digest}.safetensors"


def chosen(name: str = "kept", parts: Iterable[str] = ("gpt",)) -> Recipe:
    """The recipe of that name; ``kept`` is the full one where ``make model`` has come to its end, else the
    short one.

    parts: what the caller needs of it. Where one is missing, it would have to be trained at every call.
    """
    if name == "kept":
        return FULL if all(path_of(FULL, part).exists() for part in parts) else SHORT
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}; there are kept, {', '.join(RECIPES)}")
    return RECIPES[name]


def gpt(name: str = "kept", limit_seconds: float = math.inf, progress: Progress | None = None) -> Trained:
    """The trained model of ``chosen(name)``, from its file or trained now, for at most ``limit_seconds``.

    A training that the limit ends is not kept. ValueError: a name that there is not.
    """
    import torch

    from labs.models.gpt import GPT
    from labs.models.text import Batches, standard_library

    recipe = chosen(name)
    path = path_of(recipe)
    with torch.random.fork_rng():
        model = GPT(recipe.model)
    kept = load(path)
    if kept is not None:
        tensors, facts = kept
        model.load_state_dict({**tensors, "head.weight": tensors["embedding.tokens.weight"]})
        return Trained(model.eval(), recipe, _origin(recipe, int(facts["steps"])), int(facts["steps"]))
    batches = Batches(standard_library().train, recipe.batch, recipe.length, recipe.seed)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model.reset_parameters()
        model.train()

        def loss(step: int) -> torch.Tensor:
            tokens, targets = batches[step]
            return cross_entropy(model(tokens), targets)

        done = fit(model.parameters(), loss, recipe.steps, recipe.learning_rate, limit_seconds, progress)
    if done == recipe.steps:
        save(path, named_tensors(model), {"steps": done})
    return Trained(model.eval(), recipe, _origin(recipe, done), done)


def _origin(recipe: Recipe, steps: int) -> str:
    size = f"width {recipe.model.width}, {recipe.model.layers} blocks, {steps} of {recipe.steps} steps"
    if recipe.name == "full":
        return f"the model of make model ({size})"
    return f"a model trained for a short time ({size}); `make model` trains the real one, in minutes"


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean nats of the targets (batch, length) under logits (batch, length, vocabulary)."""
    import torch.nn.functional as F

    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def fit(
    parameters: Iterable[torch.nn.Parameter],
    loss: Callable[[int], torch.Tensor],
    steps: int,
    learning_rate: float,
    limit_seconds: float = math.inf,
    progress: Progress | None = None,
) -> int:
    """AdamW on ``loss(step)`` for ``steps``, or until the limit; the steps that were done.

    The rate follows the steps, or the time where that runs out first, so that a training that is cut short
    has come down too. One thread: the sums have one order on every machine, and the matrices are so small
    that the threads of forward and backward, two pools that spin, take 20 times the CPU time where something
    else runs (measured: 1.1 s a step of the short recipe, against 45 ms).
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _fit(parameters, loss, steps, learning_rate, limit_seconds, progress)
    finally:
        torch.set_num_threads(threads)


def _fit(
    parameters: Iterable[torch.nn.Parameter],
    loss: Callable[[int], torch.Tensor],
    steps: int,
    learning_rate: float,
    limit_seconds: float,
    progress: Progress | None,
) -> int:
    import torch

    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.95), fused=True)
    warm, begin = max(1, steps // 20), time.monotonic()
    for step in range(steps):
        elapsed = time.monotonic() - begin
        if elapsed > limit_seconds:
            return step
        part = max(step / steps, elapsed / limit_seconds)
        rate = learning_rate * min((step + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * part))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        value = loss(step)
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if progress is not None and (step + 1) % max(1, steps // 20) == 0:
            bits = value.item() / math.log(2)
            progress(f"step {step + 1} of {steps}  loss {bits:.3f} bits  {time.monotonic() - begin:.0f} s")
    return steps


# --- files ---------------------------------------------------------------------------------------


def named_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name; one that has two names (a tied head) under the first."""
    named: dict[str, Any] = dict(model.named_parameters())
    return {
        name: tensor.detach().contiguous() for name, tensor in (named | dict(model.named_buffers())).items()
    }


def save(path: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
    """Whole or not at all: written beside and renamed."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(dict(tensors), str(temporary), {"facts": json.dumps(dict(facts))})
    temporary.replace(path)


def load(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """(tensors, facts) of a kept file; None where there is none that can be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            facts = json.loads(file.metadata()["facts"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
