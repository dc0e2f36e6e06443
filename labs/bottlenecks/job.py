"""The training job that every fault is planted in: a GPT on text, healthy.

Healthy is: batches drawn beforehand, products in bfloat16 (autocast) where the machine multiplies it faster,
fused operations, AdamW in one kernel, freed memory kept (by the process it runs in), the gradient of a whole
batch at once. It runs on one thread, so that a step's time is its own and not that of threads which wait for
one another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from labs.bottlenecks.config import Config
from labs.bottlenecks.restored import Restored

if TYPE_CHECKING:
    import torch

LEARNING_RATE = 1e-3
BATCHES = 4  # drawn beforehand, and taken in turn
PROOF_STEPS = 3

Batch = tuple[Any, Any]


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _set_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)


THREADS = Restored(_threads, _set_threads)
"""Of an operation. All jobs of a group, and all labs of a run, share one process."""


class Job:
    """``step()`` trains one step and returns its loss. What a fault changes is an attribute.

    next_batch: the tokens and targets of the next step. split: cuts them into pieces, whose gradients add up.
    forward: tokens to logits. piece: a context around forward and backward of a piece, given whether it is
    the last. piece_done: called after its backward. watch: what is computed from logits and targets for the
    log, after each step. ready: called before each step after those of the proof. precision: of products.
    threads: of an operation. device: where the model is when it is built.
    """

    def __init__(self, config: Config) -> None:
        self.device = "cpu"
        self.build(config)
        self.batches = drawn(config)
        self.steps = 0
        self.next_batch: Callable[[], Batch] = self._next
        self.watch: Callable[[Any, Any], float] = lambda logits, targets: 0.0
        self.split: Callable[[Any, Any], Iterable[Batch]] = lambda tokens, targets: [(tokens, targets)]
        self.piece: Callable[[bool], AbstractContextManager[object]] = lambda last: nullcontext()
        self.piece_done: Callable[[], object] = lambda: None
        self.loss_of: Callable[[Any, Any], Any] = _cross_entropy
        self.precision = best_precision()
        self.threads = 1
        self.ready: Callable[[], object] = lambda: None
        self.watched = 0.0
        self.ranks = 1
        self.closing: list[Callable[[], None]] = []
        THREADS.enter()

    def build(self, config: Config) -> None:
        """Model and optimizer of this size."""
        import torch

        from labs.models.gpt import GPT

        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = GPT(config.gpt()).to(self.device)
        self.optimizer: Any = torch.optim.AdamW(self.model.parameters(), LEARNING_RATE, fused=True)
        self.forward: Callable[[Any], Any] = self.model

    def _next(self) -> Batch:
        return self.batches[self.steps % len(self.batches)]

    def step(self) -> torch.Tensor:
        """The mean loss of the batch before the update, float32."""
        import torch

        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        tokens, targets = self.next_batch()
        self.steps += 1
        self.optimizer.zero_grad()
        total = torch.zeros((), dtype=self.loss_type, device=self.device)
        pieces = list(self.split(tokens, targets))
        for number, (inputs, wanted) in enumerate(pieces):
            inputs, wanted = inputs.to(self.device), wanted.to(self.device)
            with self.piece(number == len(pieces) - 1):
                with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bfloat16"):
                    logits = self.forward(inputs)
                loss = self.loss_of(logits.to(self.loss_type), wanted) * (wanted.numel() / self.config.tokens)
                loss.backward()
            self.piece_done()
            total += loss.detach()
        self.optimizer.step()
        self.watched = self.watch(logits.detach().to(self.loss_type), wanted)
        return total

    @property
    def loss_type(self) -> torch.dtype:
        """Losses are computed in float32 whatever the products are in."""
        import torch

        return torch.float64 if self.precision == "float64" else torch.float32

    def close(self) -> None:
        try:
            for end in reversed(self.closing):
                end()
        finally:
            THREADS.leave()
        del self.model, self.optimizer, self.forward


class Run:
    """A job as a step to time. Its output is the proof: the losses of the first ``PROOF_STEPS`` steps (the
    mean over ranks), which setup makes by the same function, and what it watches. A call is one step."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.proof = proof_of(job)

    def __call__(self) -> Any:
        self.job.ready()
        self.job.step()
        return self.proof

    def close(self) -> None:
        self.job.close()


def proof_of(job: Job) -> torch.Tensor:
    """float64 (PROOF_STEPS + 1,)."""
    import torch
    import torch.distributed as dist

    losses = torch.stack([job.step().double().cpu() for _ in range(PROOF_STEPS)])
    if job.ranks > 1:
        dist.all_reduce(losses)
        losses /= job.ranks
    return torch.cat([losses, losses.new_tensor([job.watched])])


def _cross_entropy(logits: Any, targets: Any) -> Any:
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits.flatten(0, 1), targets.flatten())


def drawn(config: Config) -> list[Batch]:
    """Batches of ``config.sequences`` windows, (sequences, length) int64 each."""
    from labs.models.text import Batches, standard_library

    windows = Batches(standard_library().train, config.sequences, config.length, config.seed)
    return [windows[step] for step in range(BATCHES)]


def best_precision() -> str:
    """bfloat16 where this machine multiplies it faster than float32, by its features."""
    return "bfloat16" if not no_bfloat16() else "float32"


def no_bfloat16() -> str:
    """Why products in bfloat16 are no faster here, or an empty string."""
    import torch

    if any(getattr(torch.cpu, name, lambda: False)() for name in _UNITS):
        return ""
    return "this CPU has no units for bfloat16 (AMX or AVX-512 BF16)"


_UNITS = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
