"""The GPT and the encoder-decoder cut into stages for a pipeline (``parallel.pipeline``).

A stage holds blocks; the first one has the embedding before them, the last one the norm and the head behind.
Stages share the model's parameters: what is tied in the model is one tensor in two stages. They compute what
the model does, one after the other; what goes from one to the next are the states, and in the encoder-decoder
what else later stages need: the target's tokens, then the memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn

from labs.models import positions as position
from labs.models.configuration import BlockConfig
from labs.models.encoder_decoder import EncoderDecoder
from labs.models.gpt import GPT


def layers_of_stages(layers: int, stages: int | Sequence[int]) -> list[int]:
    """How many layers each stage has. stages: how many there are, which then differ by one layer at most, the
    first having more; or the layers of each.

    ValueError: fewer layers than stages, a stage without any, or layers that are not all of the model's.
    """
    if isinstance(stages, int):
        if not 1 <= stages <= layers:
            raise ValueError(f"{layers} layers cannot be cut into {stages} stages; take 1 to {layers}")
        return [layers // stages + (index < layers % stages) for index in range(stages)]
    if not stages or min(stages) < 1 or sum(stages) != layers:
        raise ValueError(
            f"stages of {', '.join(map(str, stages)) or 'no'} layers for a model of {layers}: each must have "
            f"at least one, and together they must have {layers}"
        )
    return list(stages)


class GPTStage(nn.Module):
    """Blocks of a GPT; tokens (batch, length) become states in the first stage, states logits in the last."""

    def __init__(self, model: GPT, first: int, last: int) -> None:
        super().__init__()
        self.config = model.config
        self.embedding = model.embedding if first == 0 else None
        self.blocks = nn.ModuleList(model.blocks[first:last])
        is_last = last == len(model.blocks)
        self.norm = model.norm if is_last else None
        self.head = model.head if is_last else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positions = positions_of(x, self.config)
        if self.embedding is not None:
            x = self.embedding(x, positions)
        rotation = rotation_of(x, positions, self.config)
        for block in self.blocks:
            x = block(x, rotation=rotation)
        return x if self.norm is None or self.head is None else self.head(self.norm(x))


def split_gpt(model: GPT, stages: int | Sequence[int]) -> list[nn.Module]:
    """The model as stages, each (batch, length) or (batch, length, width) to the next one's input.

    stages: see ``layers_of_stages``. Logits are those of ``model(tokens)``.
    """
    return [GPTStage(model, *ends) for ends in _ranges(layers_of_stages(len(model.blocks), stages))]


class EncoderDecoderStage(nn.Module):
    """Blocks of the encoder, of the decoder, or of both.

    What goes through, beside a mask (batch, source length) where there is one: source and target tokens into
    the first stage; states and target tokens, then states and memory, from one to the next; logits at the
    end.
    """

    def __init__(self, model: EncoderDecoder, first: int, last: int) -> None:
        super().__init__()
        self.config, border = model.config, len(model.encoder.blocks)
        total = border + len(model.decoder.blocks)
        self.source_embedding = model.source_embedding if first == 0 else None
        self.encoder = nn.ModuleList(model.encoder.blocks[first : min(last, border)])
        ends_encoder = first < border <= last
        self.encoder_norm = model.encoder.norm if ends_encoder else None
        begins_decoder = first <= border < last
        self.target_embedding = model.target_embedding if begins_decoder else None
        self.decoder = nn.ModuleList(model.decoder.blocks[max(first - border, 0) : max(last - border, 0)])
        self.decoder_norm = model.decoder.norm if last == total else None
        self.head = model.head if last == total else None

    def forward(
        self, x: torch.Tensor, other: torch.Tensor, source_mask: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """other: target tokens (batch, length) until the decoder begins, then the memory."""
        mask = None if source_mask is None else source_mask[:, None, None, :]
        if len(self.encoder):
            x = self._encode(x, mask)
        if self.target_embedding is not None:
            memory, target = x, other
            positions = positions_of(target, self.config)
            x, other = self.target_embedding(target, positions), memory
        if len(self.decoder):
            rotation = rotation_of(x, positions_of(x, self.config), self.config)
            for block in self.decoder:
                x = block(x, rotation, memory=other, memory_mask=mask)
        if self.decoder_norm is not None and self.head is not None:
            return self.head(self.decoder_norm(x))
        return (x, other) if source_mask is None else (x, other, source_mask)

    def _encode(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        positions = positions_of(x, self.config)
        if self.source_embedding is not None:
            x = self.source_embedding(x, positions)
        rotation = rotation_of(x, positions, self.config)
        for block in self.encoder:
            x = block(x, rotation, mask)
        return x if self.encoder_norm is None else self.encoder_norm(x)


def split_encoder_decoder(model: EncoderDecoder, stages: int | Sequence[int]) -> list[nn.Module]:
    """The model as stages; its layers are those of the encoder, then those of the decoder.

    The first stage takes (source, target) or (source, target, source_mask), as the model does.
    """
    layers = len(model.encoder.blocks) + len(model.decoder.blocks)
    return [EncoderDecoderStage(model, *ends) for ends in _ranges(layers_of_stages(layers, stages))]


def positions_of(x: torch.Tensor, config: BlockConfig) -> torch.Tensor:
    """0, 1, ... for tokens or states (batch, length, ...). ValueError: more than the context."""
    length = x.shape[1]
    if length > config.context:
        raise ValueError(
            f"{length} tokens do not fit the context of {config.context}; shorten the input or build the "
            f"model with context={length}"
        )
    return torch.arange(length, device=x.device)


def rotation_of(
    states: torch.Tensor, positions: torch.Tensor, config: BlockConfig
) -> position.Rotation | None:
    """cos and sin of rotary positions, which each stage computes again; None where there are none."""
    return position.rotation(config, positions, states.dtype) if config.positions == "rotary" else None


def _ranges(counts: Sequence[int]) -> list[tuple[int, int]]:
    ends = list(itertools.accumulate(counts))
    return list(zip([0, *ends], ends, strict=False))
