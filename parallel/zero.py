"""ZeRO: data parallelism whose optimizer state (stage 1) and gradients (stage 2) stand on one rank each.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", SC 2020, sections
5.1 and 5.2. Every rank updates its 1/n of the elements and all-gathers the parameters.

Stage 1: ``DistributedDataParallel`` averages the gradients; of Adam's 8 bytes a parameter in float32 a rank
holds 8 / n. An all-reduce and an all-gather a step: 1.5 times what a ring moves for plain data parallelism.
Stage 2: the optimizer's hooks reduce-scatter the gradients while backward runs and free them, so that 4 / n
bytes of 4 are left; a reduce-scatter and an all-gather move as much as one all-reduce. (Stage 3 shards the
parameters too: ``fsdp.py``.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join, Joinable, JoinHook
from torch.optim import Optimizer

from parallel import zero_state
from parallel.buckets import Slot
from parallel.same_module import broadcast_from, check_alike, described
from parallel.shards import Piece, Scattered, ShardedBucket, layout
from parallel.together import waiting_for_others
from parallel.zero_costs import predict_communication, predict_memory

__all__ = ["ZeroRedundancyOptimizer", "predict_communication", "predict_memory"]

Group = dict[str, Any]

# They look at a whole parameter, its rows or a history of all gradients: pieces would be updated otherwise.
_NOT_ELEMENTWISE = [
    getattr(torch.optim, name)
    for name in ("LBFGS", "Adafactor", "Muon", "SparseAdam")
    if hasattr(torch.optim, name)
]


class ZeroRedundancyOptimizer(Optimizer, Joinable):
    """``torch.distributed.optim.ZeroRedundancyOptimizer``: ``optimizer_class`` on this rank's share of the
    elements.

    params: as any optimizer's; the same on all ranks, whose values become rank 0's. Parameters that require
        no gradient are left alone. The parameters' memory is replaced by views of flat buckets.
    optimizer_class: elementwise (SGD, Adam, AdamW, ... of ``torch.optim`` or ``kernels``), called with
        ``defaults``.
    stage: 1, gradients whole on every rank, averaged by ``DistributedDataParallel``; 2, of the plain module:
        gradients averaged here, and ``param.grad`` is None after backward. They serve one ``step`` (or until
        ``zero_grad`` of this optimizer); until then backwards accumulate.
    bucket_cap_mb: MiB of a bucket; None is 25, the first 1.
    find_unused_parameters: in stage 2, what backward does not reach counts as zero, and is not updated where
        no rank reached it.

    ``param_groups``, schedulers, ``add_param_group``, closures work as in torch. ValueError: parameters that
    differ between ranks, another stage, an optimizer that is not elementwise.
    """

    def __init__(
        self,
        params: Iterable[Any],
        optimizer_class: type[Optimizer],
        process_group: dist.ProcessGroup | None = None,
        *,
        stage: int = 1,
        bucket_cap_mb: float | None = None,
        find_unused_parameters: bool = False,
        **defaults: Any,
    ) -> None:
        if stage not in (1, 2):
            raise ValueError(f"stage is {stage}; it is 1 (optimizer state) or 2 (gradients too)")
        if issubclass(optimizer_class, tuple(_NOT_ELEMENTWISE)):
            raise ValueError(
                f"{optimizer_class.__name__} is not elementwise: in pieces its update would differ"
            )
        self.process_group = process_group or dist.group.WORLD
        self.world_size, self.rank = (
            dist.get_world_size(self.process_group),
            dist.get_rank(self.process_group),
        )
        if self.rank < 0:
            raise ValueError(f"rank {dist.get_rank()} is not in process_group")
        self.stage, self.bucket_cap_mb, self.find_unused = stage, bucket_cap_mb, find_unused_parameters
        self.buckets: list[ShardedBucket] = []
        self.optim: Optimizer | None = None
        self.reducer: Scattered | None = None
        self._full_state: dict[str, Any] | None = None
        Optimizer.__init__(self, params, defaults)
        Joinable.__init__(self)
        self.optim = optimizer_class([self._sharded(group) for group in self.param_groups], **defaults)
        self._copy_settings(self.optim.param_groups, self.param_groups)
        self._watch()

    def add_param_group(self, param_group: Group) -> None:
        """One more group; on every rank."""
        self._full_state = None
        super().add_param_group(param_group)
        if self.optim is not None:
            self.optim.add_param_group(self._sharded(self.param_groups[-1]))
            # Its defaults; the other groups' settings may have been changed outside since the last step.
            self._copy_settings(self.optim.param_groups[-1:], self.param_groups[-1:])
            self._watch()

    def _sharded(self, group: Group) -> Group:
        """The inner optimizer's group: this rank's pieces of the parameters, with the same settings."""
        names = group.get("param_names") or [f"parameter {number}" for number in range(len(group["params"]))]
        named = [(n, p) for n, p in zip(names, group["params"], strict=True) if p.requires_grad]
        check_alike("parameters", described(named), self.process_group)
        slots = [Slot(name, param) for name, param in named]
        new = [
            ShardedBucket(len(self.buckets) + number, [slots[i] for i in indices], self.world_size, self.rank)
            for number, indices in enumerate(layout([slot.param for slot in slots], self.bucket_cap_mb))
        ]
        broadcast_from(0, [bucket.flat for bucket in new], self.process_group)
        self.buckets += new
        settings = {name: value for name, value in group.items() if name not in ("params", "param_names")}
        return {"params": [piece.tensor for bucket in new for piece in bucket.pieces], **settings}

    def _watch(self) -> None:
        slots = [slot for bucket in self.buckets for slot in bucket.slots]
        if self.stage == 2 and slots:
            self.reducer = Scattered(slots, self.buckets, self.process_group, self.find_unused)

    def pieces(self) -> Iterator[Piece]:
        """What this rank owns, in the order of the inner optimizer's parameters."""
        for bucket in self.buckets:
            yield from bucket.pieces

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update this rank's share, then gather everybody's. On every rank.

        closure: evaluates the model again and returns the loss, which is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if (joined := Join.notify_join_context(self)) is not None:
            joined.wait()
        self.update()
        return loss

    def update(self) -> None:
        """``step`` without closure and without a word to ``Join``."""
        assert self.optim is not None
        if self.reducer is not None:
            self.reducer.check_complete()
        else:
            for piece in self.pieces():
                piece.tensor.grad = piece.gradient()
        self._copy_settings(self.param_groups, self.optim.param_groups)
        self.optim.step()
        self._copy_settings(self.optim.param_groups, self.param_groups)
        self._release()
        self._full_state = None
        for bucket in self.buckets:
            if bucket.index > 1:  # two on their way at once: backends copy what they gather
                self._await(self.buckets[bucket.index - 2])
            bucket.work = bucket.gather(self.process_group)
        for bucket in self.buckets[-2:]:
            self._await(bucket)

    def _await(self, bucket: ShardedBucket) -> None:
        if bucket.work is not None:
            with waiting_for_others(f"the parameters of bucket {bucket.index}", self.process_group):
                bucket.work.wait()
            bucket.work = None

    def _release(self) -> None:
        if self.reducer is not None:
            self.reducer.discard()
        else:  # views would keep the parameters' gradients alive
            for piece in self.pieces():
                piece.tensor.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """No gradients any more, whole or sharded."""
        super().zero_grad(set_to_none)
        self._release()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Stage 2: backwards in here accumulate whole gradients on each rank, and communicate nothing.

        (Without it they are scattered at each backward, and accumulate in the shards.)
        """
        if self.reducer is None:
            raise ValueError("in stage 1 gradients are DistributedDataParallel's: use its no_sync()")
        before, self.reducer.synchronise = self.reducer.synchronise, False
        try:
            yield
        finally:
            self.reducer.synchronise = before

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scale the gradients so that their 2-norm over all parameters is at most ``max_norm``; the norm
        before.

        As torch.nn.utils.clip_grad_norm_, which in stage 2 would find no gradients. On every rank.
        """
        if self.reducer is None:
            return torch.nn.utils.clip_grad_norm_(
                [p for g in self.param_groups for p in g["params"]], max_norm
            )
        self.reducer.check_complete()
        gradients = [piece.tensor.grad for piece in self.pieces() if piece.tensor.grad is not None]
        device = self.param_groups[0]["params"][0].device
        dtype = torch.promote_types(torch.float32, self.param_groups[0]["params"][0].dtype)
        squares = torch.zeros((), dtype=dtype, device=device)
        for gradient in gradients:
            squares += gradient.to(dtype).square().sum()
        dist.all_reduce(squares, group=self.process_group)
        norm = squares.sqrt()
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        for gradient in gradients:
            gradient.mul_(scale)
        return norm

    @staticmethod
    def _copy_settings(source: list[Group], target: list[Group]) -> None:
        """Learning rates and the like: a scheduler sets them outside, some optimizers change them inside."""
        for from_, to in zip(source, target, strict=True):
            to.update({k: v for k, v in from_.items() if k not in ("params", "param_names")})

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Gather the state on the group's rank ``to``, where ``state_dict`` then gives it. On every rank."""
        self._full_state = zero_state.gather(self, to)

    def state_dict(self) -> dict[str, Any]:
        """What ``optimizer_class`` itself would give, unsharded. RuntimeError where it was not
        consolidated."""
        if self._full_state is None:
            raise RuntimeError(
                f"the state is not on rank {self.rank}: call consolidate_state_dict(to={self.rank}) on "
                "every rank after the last change, or take sharded_state_dict()"
            )
        return self._full_state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Each rank's share of an unsharded state: of ours or of ``optimizer_class``, from any number of
        ranks."""
        self._full_state = None
        zero_state.load(self, state_dict)

    def sharded_state_dict(self) -> dict[str, Any]:
        """This rank's share: {"state": {parameter's index: {"first", "last", state's name: (last - first,)}},
        "param_groups"}. Nothing is communicated."""
        return zero_state.sharded(self)

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """For ``Join([model, optimizer])``: a rank without batches goes on to update its share.

        ValueError in stage 2: nothing would announce a batch before its backward communicates.
        """
        if self.stage == 2:
            raise ValueError("stage 2 does not join uneven inputs; use stage 1, Join([model, optimizer])")
        return _Joined(self)

    @property
    def join_device(self) -> torch.device:
        return self.param_groups[0]["params"][0].device

    @property
    def join_process_group(self) -> Any:
        return self.process_group


class _Joined(JoinHook):
    def __init__(self, optimizer: ZeroRedundancyOptimizer) -> None:
        self.optimizer = optimizer

    @torch.no_grad()
    def main_hook(self) -> None:
        self.optimizer.update()

    def post_hook(self, is_last_joiner: bool) -> None:
        Joinable.__init__(self.optimizer)
