"""The sizes and options of the models, checked when they are stated."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args, get_type_hints

Positions = Literal["learned", "rotary", "sinusoidal"]
Norm = Literal["layer", "rms"]
NormPosition = Literal["pre", "post"]
Activation = Literal["gelu", "gelu_tanh", "relu", "swiglu"]
Initialization = Literal["gpt2", "xavier", "kaiming"]
Functional = Literal["torch.nn.functional", "kernels"]


@dataclass(frozen=True)
class RotaryScaling:
    """Rotary frequencies of a model whose context was extended, as in Llama 3.1's ``rope_scaling``.

    factor: wavelengths longer than original_context / low_frequency_factor positions are stretched by it;
        those shorter than original_context / high_frequency_factor stay; in between it is interpolated.
    original_context: positions of the pre-training. 0: every wavelength is stretched ("linear").
    """

    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context: int = 0

    def __post_init__(self) -> None:
        if self.factor < 1 or self.original_context < 0:
            raise ValueError(
                f"factor={self.factor} and original_context={self.original_context}: a rotary scaling "
                "stretches, by a factor of at least 1, from a context of at least 0 positions"
            )
        if not 0 < self.low_frequency_factor < self.high_frequency_factor:
            raise ValueError(
                f"low_frequency_factor={self.low_frequency_factor} must lie between 0 and "
                f"high_frequency_factor={self.high_frequency_factor}"
            )


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """What every block of a model has in common. The defaults are GPT-2's, small.

    width: numbers that stand for a token between blocks (d_model).
    heads: query heads. kv_heads: key and value heads, a divisor of heads: equal to it (the default) is
        multi-head attention, 1 is multi-query, in between grouped. head_dim: width / heads by default.
    hidden: width of the feed-forward layer; by default 4 width, with SwiGLU 8/3 width rounded up to a
        multiple of 8, which makes its three matrices as large as the other's two.
    context: the longest sequence, in tokens. positions: added to the embeddings from a learned table, or from
        sinusoids (the embeddings are then scaled by sqrt(width), Vaswani et al. 2017, section 3.4), or as
        rotations of queries and keys (Su et al. 2021) with the base rotary_base.
    norm: LayerNorm or RMSNorm, before each sublayer ("pre", with one more at the end) or after each residual
        sum ("post"), with norm_epsilon added to the variance or mean square.
    activation: GELU (exact or tanh), ReLU, or SwiGLU (Shazeer 2020).
    bias: in every linear layer but the head, and in LayerNorm. dropout: probability, on embeddings, attention
        weights and the output of each sublayer.
    initialization: see ``labs/models/initialization.py``.
    functional: the namespace that attention, norms, activations and rotation are taken from.
    """

    width: int = 128
    heads: int = 4
    kv_heads: int | None = None
    head_dim: int | None = None
    hidden: int | None = None
    context: int = 256
    positions: Positions = "learned"
    rotary_base: float = 10_000.0
    rotary_scaling: RotaryScaling | None = None
    norm: Norm = "layer"
    norm_position: NormPosition = "pre"
    norm_epsilon: float = 1e-5
    activation: Activation = "gelu"
    bias: bool = True
    dropout: float = 0.0
    initialization: Initialization = "gpt2"
    functional: Functional = "torch.nn.functional"

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value, allowed = getattr(self, field.name), get_args(hints[field.name])
            if allowed and isinstance(allowed[0], str) and value not in allowed:
                raise ValueError(f"{field.name}={value!r} is not one of {', '.join(map(repr, allowed))}")
            whole = hints[field.name] is int or allowed == (int, type(None))
            if whole and value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{field.name}={value!r} is not a whole number of at least 1")
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(
                f"heads={self.heads} does not divide width={self.width}; choose a divisor or state head_dim"
            )
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads={self.kv_heads} does not divide heads={self.heads}: each key head serves as many "
                f"query heads as any other; {_divisors(self.heads)} would"
            )
        if self.positions == "rotary" and self.size_of_head % 2:
            raise ValueError(
                f"a head of {self.size_of_head} numbers cannot be rotated in pairs; rotary positions need an "
                "even head_dim"
            )
        if self.positions == "sinusoidal" and self.width % 2:
            raise ValueError(f"width={self.width} is odd; sinusoidal positions are pairs of sine and cosine")
        if self.rotary_scaling is not None and self.positions != "rotary":
            raise ValueError(f"rotary_scaling needs positions='rotary', not {self.positions!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} is not a probability from 0 to below 1")
        if self.norm_epsilon < 0 or self.rotary_base <= 1:
            raise ValueError(
                f"norm_epsilon={self.norm_epsilon} must be at least 0 and rotary_base={self.rotary_base} "
                "above 1"
            )

    @property
    def size_of_head(self) -> int:
        return self.head_dim or self.width // self.heads

    @property
    def key_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def size_of_hidden(self) -> int:
        if self.hidden is not None:
            return self.hidden
        return -(-8 * self.width // 24) * 8 if self.activation == "swiglu" else 4 * self.width


@dataclass(frozen=True, kw_only=True)
class GPTConfig(BlockConfig):
    """A decoder-only model. vocabulary: tokens (256: bytes). tied: the head's matrix is the embedding's."""

    vocabulary: int = 256
    layers: int = 4
    tied: bool = True


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(BlockConfig):
    """The defaults are those of Vaswani et al. 2017, small.

    context: the longest source and the longest target. tied: source embedding, target embedding and head
    are one matrix (section 3.4), for which both vocabularies must be equal. final_norm: one more norm after
    the last block of encoder and decoder, as ``torch.nn.Transformer`` has it even after post-norm; by default
    with pre-norm, which needs it.
    """

    positions: Positions = "sinusoidal"
    norm_position: NormPosition = "post"
    activation: Activation = "relu"
    initialization: Initialization = "xavier"
    source_vocabulary: int = 256
    target_vocabulary: int = 256
    encoder_layers: int = 2
    decoder_layers: int = 2
    tied: bool = True
    final_norm: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tied and self.source_vocabulary != self.target_vocabulary:
            raise ValueError(
                f"tied embeddings need one vocabulary, not source_vocabulary={self.source_vocabulary} and "
                f"target_vocabulary={self.target_vocabulary}; make them equal or set tied=False"
            )

    @property
    def has_final_norm(self) -> bool:
        return self.norm_position == "pre" if self.final_norm is None else self.final_norm


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
