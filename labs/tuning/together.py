"""Several trials in one step: the GPT as a function of its parameters in JAX, mapped over trials by ``vmap``.

Trials of one shape differ in numbers only: the parameters of K trials become one array more deep, and their
points arrays of K numbers. One step then has as many operations as that of a single trial, each K times as
large, which is what small models lack.

The same mathematics as ``labs.tuning.training``, beginning with the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

from labs.tuning.space import Point
from labs.tuning.training import EPSILON, HEAD, WARM_UP, Task, Training, batch

Parameters = dict[str, Any]


def logits(parameters: Parameters, tokens: Any, layers: int) -> Any:
    """(batch, length) to (batch, length, vocabulary): ``labs.models.gpt.GPT`` without biases."""
    import jax
    import jax.numpy as np

    def norm(x: Any, name: str) -> Any:
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * parameters[f"{name}.weight"]

    def linear(x: Any, name: str) -> Any:
        return x @ parameters[f"{name}.weight"].T

    def heads(x: Any) -> Any:
        return x.reshape(*x.shape[:-1], -1, HEAD).swapaxes(-2, -3)

    length = tokens.shape[-1]
    seen = np.tril(np.ones((length, length), bool))
    table = parameters["embedding.tokens.weight"]
    # A product with ones and zeros: the gradient of an index would be a loop over tokens, one at a time.
    x = (
        jax.nn.one_hot(tokens, len(table), dtype=table.dtype) @ table
        + parameters["embedding.positions.weight"][:length]
    )
    for block in range(layers):
        at = f"blocks.{block}."
        y = norm(x, at + "attention_norm")
        query, key, value = (heads(linear(y, f"{at}attention.{name}")) for name in ("query", "key", "value"))
        scores = np.where(seen, query @ key.swapaxes(-1, -2) / HEAD**0.5, -np.inf)
        mixed = (jax.nn.softmax(scores, -1) @ value).swapaxes(-2, -3)
        x = x + linear(mixed.reshape(x.shape), at + "attention.output")
        y = linear(norm(x, at + "feed_forward_norm"), at + "feed_forward.up")
        x = x + linear(jax.nn.gelu(y, approximate=False), at + "feed_forward.down")
    return norm(x, "norm") @ table.T


def loss_of(parameters: Parameters, tokens: Any, targets: Any, layers: int) -> Any:
    """Mean cross-entropy in nats."""
    import jax

    logarithms = jax.nn.log_softmax(logits(parameters, tokens, layers))
    chosen = jax.nn.one_hot(targets, logarithms.shape[-1], dtype=logarithms.dtype)
    return -(logarithms * chosen).sum(-1).mean()


def _step(state: Any, point: Any, tokens: Any, targets: Any, layers: int) -> Any:
    """One step of AdamW (Loshchilov and Hutter 2019, algorithm 2) of one trial."""
    import jax
    import jax.numpy as np

    parameters, first, second, step = state
    rate, momentum_loss, variance_loss, decay = point
    gradients = jax.grad(loss_of)(parameters, tokens, targets, layers)
    step = step + 1
    rate = rate * np.minimum(1.0, step / WARM_UP)
    mean_part = 1 - (1 - momentum_loss) ** step
    square_part = 1 - (1 - variance_loss) ** step
    mapped = jax.tree_util.tree_map
    first = mapped(lambda m, g: m + momentum_loss * (g - m), first, gradients)
    second = mapped(lambda v, g: v + variance_loss * (g * g - v), second, gradients)

    def update(p: Any, m: Any, v: Any) -> Any:
        return p * (1 - rate * decay) - rate * (m / mean_part) / (np.sqrt(v / square_part) + EPSILON)

    return mapped(update, parameters, first, second), first, second, step


@cache
def _compiled(layers: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(step of all trials, losses of all trials): trials along the first axis, batches shared."""
    import jax

    step = jax.vmap(partial(_step, layers=layers), in_axes=(0, 0, None, None))
    loss = jax.vmap(partial(loss_of, layers=layers), in_axes=(0, None, None))
    return jax.jit(step), jax.jit(loss)


class Together:
    """The trials of ``points`` in one training. ``step`` and ``losses`` return without waiting."""

    def __init__(self, task: Task, points: Sequence[Point]) -> None:
        import jax.numpy as np

        if not points:
            raise ValueError("no points: give at least one")
        self.task, count = task, len(points)
        model = Training(task, points[0]).model
        begin = {name: np.asarray(value.detach().numpy()) for name, value in model.named_parameters()}
        stacked = {name: np.repeat(value[None], count, 0) for name, value in begin.items()}
        zeros = {name: np.zeros_like(value) for name, value in stacked.items()}
        self.begin: Any = (stacked, zeros, zeros, np.zeros(count, np.int32))
        self.points = tuple(
            np.asarray(column, np.float32) for column in zip(*(p.values for p in points), strict=True)
        )
        self.advanced, self.loss = _compiled(task.layers)
        self.rewind()

    def rewind(self) -> None:
        """As they were made."""
        self.state, self.steps = self.begin, 0

    def step(self) -> None:
        tokens, targets = (tensor.numpy() for tensor in batch(self.task, self.steps))
        self.state = self.advanced(self.state, self.points, tokens, targets)
        self.steps += 1

    def losses(self, tokens: Any, targets: Any) -> Any:
        """(trials,) in nats."""
        return self.loss(self.state[0], tokens.numpy(), targets.numpy())
