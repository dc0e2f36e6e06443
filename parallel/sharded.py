"""A tensor that several ranks hold together, described so that a checkpoint can take it apart and put it
back.

What `parallel.zero` and `parallel.fsdp` hold is a range of each tensor's elements. PyTorch's checkpoint
(``torch.distributed.checkpoint``) stores boxes of n-dimensional tensors. A range is a few boxes, so the
one is said in the words of the other, and resharding is PyTorch's.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


@dataclass
class Sharded:
    """This rank's part of a tensor that several ranks hold together.

    local: any shape, contiguous; its elements are ``offset`` to ``offset + local.numel()`` of the whole,
    flattened row by row. A slab of dimension 0 that begins with row r has ``offset = r * row_size``.
    shape: of the whole tensor. Replicas (the second dimension of HSDP) hand in the same part.

    It is stored as boxes of the whole tensor (a range is at most ``2 * len(shape) - 1`` of them), so what
    was sharded in one way is read by what is sharded in another, by DTensor, or by nothing.
    """

    local: torch.Tensor
    shape: tuple[int, ...]
    offset: int

    def __post_init__(self) -> None:
        self.shape = tuple(self.shape)
        end, total = self.offset + self.local.numel(), math.prod(self.shape)
        if self.offset < 0 or end > total:
            raise ValueError(f"elements {self.offset} to {end} of a tensor of {total} elements {self.shape}")
        if not self.local.is_contiguous():
            raise ValueError(
                "the local part of a sharded tensor is contiguous, so that it can be loaded into"
            )

    @property
    def dtype(self) -> torch.dtype:
        return self.local.dtype

    def boxes(self) -> Iterator[tuple[ChunkStorageMetadata, torch.Tensor]]:
        """(where the box lies in the whole, the view of ``local`` that holds it)."""
        flat, start = self.local.detach().view(-1), 0
        for offsets, sizes in boxes_of_range(self.shape, self.offset, self.offset + flat.numel()):
            count = math.prod(sizes)
            chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            yield chunk, flat[start : start + count].view(sizes)
            start += count

    # What torch.distributed.checkpoint asks of an object that it saves and loads (its _Checkpointable).
    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        properties, size = TensorProperties(self.dtype), torch.Size(self.shape)
        return [
            WriteItem(
                MetadataIndex(name, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, size),
            )
            for chunk, _ in self.boxes()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [chunk for chunk, _ in self.boxes()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return next(view for chunk, view in self.boxes() if chunk.offsets == index.offset)


def of_one_rank(parameter: torch.nn.Parameter, ranks: int) -> torch.nn.Parameter:
    """The parameter, marked: each of ``ranks`` has another in its place (tensor and expert parallelism)."""
    parameter.of_one_rank = ranks > 1
    return parameter


def is_of_one_rank(tensor: torch.Tensor) -> bool:
    """Whether ``of_one_rank`` has marked it."""
    return getattr(tensor, "of_one_rank", False)


def boxes_of_range(
    shape: tuple[int, ...], start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, sizes) of the boxes that elements ``start`` to ``stop`` of the flattened tensor make up, in
    order."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    while start < stop:
        first, inside = divmod(start, row)
        whole = (stop - start) // row
        if inside == 0 and whole:
            yield (first, *[0] * (len(shape) - 1)), (whole, *shape[1:])
            start += whole * row
        else:
            end = min(stop, (first + 1) * row)
            for offsets, sizes in boxes_of_range(shape[1:], inside, inside + end - start):
                yield (first, *offsets), (1, *sizes)
            start = end


def uncovered(parts: list[tuple[int, int]], shape: tuple[int, ...]) -> str | None:
    """What is wrong with parts (offset, length) of one tensor that should make it up; equal parts are
    replicas."""
    parts = sorted({part for part in parts if part[1]})
    ends = [0, *(offset + length for offset, length in parts)]
    starts = [*(offset for offset, _ in parts), math.prod(shape)]
    for end, start in itertools.zip_longest(ends, starts):
        if end != start:
            problem = "is on no rank" if end < start else "is in parts that overlap without being equal"
            return f"element {min(end, start)} of {math.prod(shape)} {problem}"
    return None


Layout = tuple[tuple[int, ...], str, tuple[int, int] | None]


def layout(tensor: torch.Tensor | Sharded) -> Layout:
    """(shape of the whole, dtype, (offset, length) of this rank's part or None)."""
    part = (tensor.offset, tensor.local.numel()) if isinstance(tensor, Sharded) else None
    return tuple(tensor.shape), str(tensor.dtype), part


def check_layouts(layouts: list[dict[str, Layout]]) -> None:
    """ValueError if ranks disagree on a tensor, or its parts do not make it up; layouts by rank and name."""
    for name in sorted(set().union(*layouts)):
        held = {rank: layout[name] for rank, layout in enumerate(layouts) if name in layout}
        first = next(iter(held))
        for rank, (shape, dtype, part) in held.items():
            if (shape, dtype, part is None) != (*held[first][:2], held[first][2] is None):
                told = [
                    f"{'a part of ' * bool(p)}{s} {d} on rank {r}"
                    for r, (s, d, p) in held.items()
                    if r in (first, rank)
                ]
                raise ValueError(f"{name} is {' and '.join(told)}")
        ranges = {rank: part for rank, (_, _, part) in held.items() if part}
        if ranges and (problem := uncovered(list(ranges.values()), held[first][0])):
            parts = ", ".join(f"{start} to {start + n} on rank {rank}" for rank, (start, n) in ranges.items())
            raise ValueError(f"{name}: {problem}; the parts are elements {parts}")
