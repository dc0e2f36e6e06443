"""The project's GPT over paged keys and values: batches of single tokens and pieces of prompts in one
forward.

All tokens of a step stand behind each other in one row, so that every linear layer sees one matrix. Only
attention knows sequences: it is replaced (``Attention.attend``) by one that stores keys and values by slot,
lets the single tokens read theirs by block table (``kernels.decode_attention``), and gives each piece of a
prompt its own. Where the model is one that it takes, ``labs.serving.compiled`` computes the single
tokens by themselves, in one compiled call.

The cache is one tensor (blocks, layers, 2, kv_heads, block_size, head_dim): what leaves for another worker is
a row of it for each block, and what one head reads of a block lies in one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import kernels
from labs.models.gpt import GPT
from labs.serving.compiled import CompiledDecode, takes
from labs.serving.policies import Work


@dataclass
class Piece:
    """Tokens ``first`` to ``last`` of the row: a piece of a prompt that begins at ``start`` of its
    sequence."""

    first: int
    last: int
    start: int
    places: torch.Tensor | None  # slots of the keys it attends to; None: its own tokens alone
    mask: torch.Tensor | None


@dataclass
class Batch:
    """What attention has to know of a step. slots: (tokens, kv_heads) where each token's keys go."""

    slots: torch.Tensor
    singles: int
    table: torch.Tensor
    lengths: torch.Tensor
    pieces: list[Piece]


class PagedGPT:
    """The executor that computes. It changes the model's attention, so that the model serves here alone.

    blocks, block_size: of the cache, in the dtype of the model's weights. ValueError: a model with dropout.
    """

    def __init__(self, model: GPT, blocks: int, block_size: int) -> None:
        config = model.config
        if config.dropout:
            raise ValueError(f"dropout={config.dropout}: a model that serves has none")
        self.model, self.block_size = model.eval(), block_size
        weight = model.head.weight
        self.cache = weight.new_zeros(
            blocks, config.layers, 2, config.key_heads, block_size, config.size_of_head
        ).requires_grad_(False)
        self.heads = config.key_heads
        # For decode_attention each head of a sequence is a sequence of its own, with blocks of its own: of
        # the cache seen as blocks of one head, it has one in layers x 2 x kv_heads.
        self.flat = self.cache.view(-1, block_size, 1, config.size_of_head)
        self.slots = self.cache.view(-1, config.size_of_head)
        self.batch: Batch | None = None
        self.decode = CompiledDecode(model, self.cache) if takes(model) else None
        for layer, block in enumerate(model.blocks):
            block.attention.attend = self._attention_of(layer)

    @torch.inference_mode()
    def run(self, works: Sequence[Work]) -> list[int]:
        """See ``Executor.run``."""
        singles = [index for index, work in enumerate(works) if work.count == 1]
        rest = [index for index, work in enumerate(works) if work.count > 1]
        found: dict[int, int] = {}
        if self.decode is None:
            rest = singles + rest
        elif singles:
            mine = [works[index] for index in singles]
            logits = self.decode(
                [work.running.tokens[work.start] for work in mine],
                [work.start for work in mine],
                [work.running.blocks for work in mine],
            )
            rows = [row for row, work in enumerate(mine) if work.writes]
            chosen = _choose(logits[rows], [mine[row] for row in rows])
            found |= zip((singles[row] for row in rows), chosen, strict=True)
        if rest:
            found |= zip(rest, self._forward([works[index] for index in rest]), strict=True)
        return [found[index] for index, work in enumerate(works) if work.writes]

    def _forward(self, works: Sequence[Work]) -> list[int]:
        """Through the model's own blocks, single tokens first: the next token of each, any number where it
        does not write."""
        row: list[int] = []
        positions: list[int] = []
        ends: list[int] = []
        for work in works:
            end = work.start + work.count
            row += work.running.tokens[work.start : end]
            positions += range(work.start, end)
            ends.append(len(row) - 1)
        self.batch = self._batch(works)
        where = torch.tensor(positions)
        x = self.model.embedding(torch.tensor([row]), where)
        rotation = self.model.rotation(where, x.dtype)
        for block in self.model.blocks:
            x = block(x, rotation=rotation)
        self.batch = None
        return _choose(self.model.head(self.model.norm(x[0, ends])), works)

    def take_out(self, blocks: Sequence[int], tokens: int) -> tuple[Any, int]:
        """NumPy (blocks, layers, 2, kv_heads, block_size, head_dim), a copy, and its bytes."""
        count = -(-tokens // self.block_size)
        payload = self.cache[list(blocks[:count])].numpy()
        return payload, payload.nbytes

    def put_in(self, blocks: Sequence[int], payload: Any, skipped: int) -> int:
        """ValueError: a payload of other shape or dtype (another model's)."""
        if len(blocks) == 0:
            return 0
        wanted = (len(blocks) + skipped, *self.cache.shape[1:])
        kind = np.dtype(str(self.cache.dtype).removeprefix("torch."))
        if payload.shape != wanted or payload.dtype != kind:
            raise ValueError(
                f"keys and values of shape {payload.shape} ({payload.dtype}) arrive; this model has {wanted} "
                f"({kind})"
            )
        self.cache.numpy()[list(blocks)] = payload[skipped:]
        return int(payload[skipped:].nbytes)

    def _batch(self, works: Sequence[Work]) -> Batch:
        """Slots are those of layer 0's keys; layers and values follow at fixed distances."""
        size, heads, stride = self.block_size, self.heads, self.cache.shape[1] * 2 * self.heads
        head = np.arange(heads)
        slots = np.empty((sum(work.count for work in works), heads), np.int64)
        singles = [work for work in works if work.count == 1]
        widest = max((-(-(work.start + 1) // size) for work in singles), default=1)
        table = np.zeros((len(singles), heads, widest), np.int32)
        pieces, place = [], 0
        for index, work in enumerate(works):
            end = work.start + work.count
            blocks = np.asarray(work.running.blocks[: -(-end // size)], np.int64) * stride
            if work.count == 1:
                table[index, :, : len(blocks)] = blocks + head[:, None]
                slots[place] = (blocks[-1] + head) * size + work.start % size
            else:
                every = (blocks[:, None] * size + np.arange(size)).ravel()[:end, None] + head * size
                slots[place : place + work.count] = every[work.start :]
                places = mask = None
                if work.start:
                    places = torch.from_numpy(every)
                    mask = torch.ones(work.count, end, dtype=torch.bool).tril_(work.start)
                pieces.append(Piece(place, place + work.count, work.start, places, mask))
            place += work.count
        lengths = torch.tensor([work.start + 1 for work in singles], dtype=torch.int32)
        return Batch(
            torch.from_numpy(slots),
            len(singles),
            torch.from_numpy(table).flatten(0, 1),
            lengths.repeat_interleave(heads),
            pieces,
        )

    def _attention_of(self, layer: int) -> Any:
        size, heads = self.block_size, self.heads
        keys_at, values_at = (
            2 * layer * heads,
            (2 * layer + 1) * heads,
        )  # in blocks of ``flat``, behind a block's first
        common = len(self.flat) - values_at

        def attend(
            query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
        ) -> torch.Tensor:
            """All (1, heads, tokens, head_dim); options are those of an attention without a cache."""
            batch = self.batch
            if batch is None:
                raise RuntimeError("a model that serves is called by its executor alone")
            slots = self.slots
            slots[batch.slots + keys_at * size] = key[0].transpose(0, 1)
            slots[batch.slots + values_at * size] = value[0].transpose(0, 1)
            parts = []
            if batch.singles:
                # The same table for each layer, in a cache that begins so many blocks later.
                mine = query[0, :, : batch.singles].transpose(0, 1)
                attended = kernels.decode_attention(
                    mine.reshape(batch.singles * heads, -1, mine.shape[-1]),
                    self.flat[keys_at : keys_at + common],
                    self.flat[values_at : values_at + common],
                    batch.table,
                    batch.lengths,
                )
                parts.append(attended.view(mine.shape).transpose(0, 1)[None])
            grouped = query.shape[1] != key.shape[1]
            for piece in batch.pieces:
                here = slice(piece.first, piece.last)
                if piece.places is None:
                    k, v = key[:, :, here], value[:, :, here]
                else:
                    k, v = (
                        slots[piece.places + at * size].transpose(0, 1)[None] for at in (keys_at, values_at)
                    )
                parts.append(
                    F.scaled_dot_product_attention(
                        query[:, :, here],
                        k,
                        v,
                        attn_mask=piece.mask,
                        is_causal=piece.mask is None,
                        enable_gqa=grouped,
                    )
                )
            return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

        return attend


def _choose(logits: torch.Tensor, works: Sequence[Work]) -> list[int]:
    """The likeliest token of each row, or of the row with noise: the largest of logits + temperature x Gumbel
    noise is a draw from softmax(logits / temperature) (Gumbel 1954), at any temperature. The noise is that of
    seed and place."""
    for row, work in enumerate(works):
        request = work.running.request
        if request.temperature > 0:
            noise = np.random.default_rng((request.seed, work.running.written)).gumbel(size=logits.shape[1])
            logits[row] += torch.from_numpy(request.temperature * noise).to(logits.dtype)
    return logits.argmax(-1).tolist()
