"""How many parameters, FLOPs and bytes of activations a model has, from its configuration alone.

Conventions. FLOPs are those of matrix products, two for a multiplication and addition, all scores counted
whether a causal mask lets them be skipped or not (as ``torch.utils.flop_counter`` and Chowdhery et al. 2022,
appendix B); backward takes twice forward. Activations are what autograd keeps from the forward pass until the
backward: distinct storages, without the parameters and the input tokens. What an operation keeps is a
property of its implementation; here it is that of torch.nn.functional on the CPU.
"""

from __future__ import annotations

import torch

from labs.models.configuration import BlockConfig, EncoderDecoderConfig, GPTConfig

# --- parameters ----------------------------------------------------------------------------------


def parameters(config: GPTConfig | EncoderDecoderConfig) -> int:
    """Numbers that are trained; a tied matrix counts once."""
    if isinstance(config, GPTConfig):
        tables = config.vocabulary * config.width * (1 if config.tied else 2) + _positions(config)
        final = _norm(config) if config.norm_position == "pre" else 0
        return tables + config.layers * _block(config, cross=False) + final
    vocabularies = (config.source_vocabulary, *(config.target_vocabulary,) * 2)  # the third is the head's
    tables = config.width * (vocabularies[0] if config.tied else sum(vocabularies)) + 2 * _positions(config)
    encoder = config.encoder_layers * _block(config, cross=False)
    decoder = config.decoder_layers * _block(config, cross=True)
    return tables + encoder + decoder + (2 * _norm(config) if config.has_final_norm else 0)


def _positions(config: BlockConfig) -> int:
    return config.context * config.width if config.positions == "learned" else 0


def _norm(config: BlockConfig) -> int:
    return config.width * (2 if config.norm == "layer" and config.bias else 1)


def _block(config: BlockConfig, cross: bool) -> int:
    attentions = 2 if cross else 1
    heads = config.heads + 2 * config.key_heads
    biases = attentions * (heads * config.size_of_head + config.width)
    biases += config.size_of_hidden * (2 if config.activation == "swiglu" else 1) + config.width
    matrices = attentions * _attention_matrices(config) + _feed_forward_matrices(config)
    return matrices + (biases if config.bias else 0) + (attentions + 1) * _norm(config)


def _attention_matrices(config: BlockConfig) -> int:
    """Numbers in the query, key, value and output matrices."""
    return config.width * config.size_of_head * 2 * (config.heads + config.key_heads)


def _feed_forward_matrices(config: BlockConfig) -> int:
    return config.width * config.size_of_hidden * (3 if config.activation == "swiglu" else 2)


# --- FLOPs ---------------------------------------------------------------------------------------


def flops_per_token(config: GPTConfig, length: int, backward: bool = True) -> int:
    """FLOPs of one token in a sequence of ``length``: 2 for each number in a matrix, 4 for each number of
    each key and value that it meets; three times that with the backward pass."""
    matrices = config.layers * (_attention_matrices(config) + _feed_forward_matrices(config))
    head = config.width * config.vocabulary
    forward = 2 * (matrices + head) + config.layers * _scores(config, length)
    return forward * (3 if backward else 1)


def flops_per_pair(
    config: EncoderDecoderConfig, source_length: int, target_length: int, backward: bool = True
) -> int:
    """FLOPs of one source and its target."""
    feed_forward, keys = _feed_forward_matrices(config), config.width * config.key_heads * config.size_of_head
    encoder_token = 2 * (_attention_matrices(config) + feed_forward) + _scores(config, source_length)
    # In cross-attention queries and outputs are the target's, keys and values the source's.
    decoder_token = 2 * (2 * _attention_matrices(config) - 2 * keys + feed_forward)
    decoder_token += _scores(config, target_length) + _scores(config, source_length)
    forward = source_length * (config.encoder_layers * encoder_token + config.decoder_layers * 4 * keys)
    forward += target_length * (
        config.decoder_layers * decoder_token + 2 * config.width * config.target_vocabulary
    )
    return forward * (3 if backward else 1)


def _scores(config: BlockConfig, keys: int) -> int:
    """FLOPs of one query: its scores with the keys, and the sum of their values."""
    return 4 * keys * config.heads * config.size_of_head


# --- activations ---------------------------------------------------------------------------------


def activation_bytes(
    config: GPTConfig, batch: int, length: int, dtype: torch.dtype = torch.float32, loss: bool = True
) -> int:
    """Bytes kept by ``model(tokens)`` in training, and by the mean cross-entropy of its logits (``loss``).

    ValueError for ``functional="kernels"``: what those keep depends on sizes.
    """
    kept = _Kept(config, dtype)
    total = kept.embedding(batch, length) + config.layers * kept.block(batch, length)
    total += kept.norm(batch * length) if config.norm_position == "pre" else 0
    total += kept.states(batch * length)  # the head's input
    return total + (kept.loss(batch * length, config.vocabulary) if loss else 0)


def activation_bytes_of_pair(
    config: EncoderDecoderConfig,
    batch: int,
    source_length: int,
    target_length: int,
    dtype: torch.dtype = torch.float32,
    loss: bool = True,
) -> int:
    """The same for ``model(source, target)`` without a mask for padding."""
    kept = _Kept(config, dtype)
    total = 0
    for length, layers in ((source_length, config.encoder_layers), (target_length, config.decoder_layers)):
        total += kept.embedding(batch, length) + layers * kept.block(batch, length)
        total += kept.norm(batch * length) if config.has_final_norm else 0
        total += kept.states(batch * length)  # the memory, once for all that attend to it; the head's input
    attention = kept.attention(batch, target_length, source_length, rotated=False)
    total += config.decoder_layers * (kept.sublayer(batch * target_length) + attention)
    return total + (kept.loss(batch * target_length, config.target_vocabulary) if loss else 0)


class _Kept:
    """Bytes that each part keeps for its backward pass."""

    def __init__(self, config: BlockConfig, dtype: torch.dtype) -> None:
        if config.functional != "torch.nn.functional":
            raise ValueError(
                f"what functional={config.functional!r} keeps depends on sizes; the formula is for "
                "'torch.nn.functional'"
            )
        self.config = config
        self.size = dtype.itemsize
        self.wide = max(4, self.size)  # statistics of 16-bit tensors are float32

    def states(self, tokens: int) -> int:
        """One tensor as wide as the model."""
        return tokens * self.config.width * self.size

    def dropout(self, tokens: int) -> int:
        """Its mask, in the dtype of its input."""
        return self.states(tokens) if self.config.dropout else 0

    def embedding(self, batch: int, length: int) -> int:
        """The positions (int64) of a learned table, or cos and sin of each pair for all blocks."""
        tables = {"learned": 8, "rotary": self.config.size_of_head * self.wide, "sinusoidal": 0}
        return length * tables[self.config.positions] + self.dropout(batch * length)

    def norm(self, tokens: int) -> int:
        """Input, mean and deviation; RMSNorm: input and quotient, and the root, in float32 at least."""
        if self.config.norm == "layer":
            return tokens * (self.config.width + 2) * self.size
        return tokens * (2 * self.config.width + 1) * self.wide

    def sublayer(self, tokens: int) -> int:
        """Around attention or feed-forward: the norm, the input of the first matrices, the dropout."""
        return self.norm(tokens) + self.states(tokens) + self.dropout(tokens)

    def attention(self, batch: int, queries: int, keys: int, rotated: bool) -> int:
        """Query, key, value, output and the logarithm of each query's sum; where queries are rotated they
        lie head by head, and so does the output, which the last layer then keeps in its own order too. With
        dropout torch computes the scores in float32 at least, with keys and values repeated for each head,
        and keeps weights, mask and their product."""
        heads, size = self.config.heads, self.config.size_of_head
        output = queries * heads * size * self.size
        if self.config.dropout:
            kept = heads * (queries * size + 2 * keys * size + 3 * queries * keys) * self.wide
        else:
            numbers = queries * heads * size + 2 * keys * self.config.key_heads * size
            kept = numbers * self.size + queries * heads * self.wide + (output if rotated else 0)
        return batch * (kept + output)

    def feed_forward(self, tokens: int) -> int:
        """GELU: its input and output. ReLU: its output. SwiGLU: gate, its SiLU, up, and the product."""
        tensors = {"gelu": 2, "gelu_tanh": 2, "relu": 1, "swiglu": 4}[self.config.activation]
        return tensors * tokens * self.config.size_of_hidden * self.size

    def block(self, batch: int, length: int) -> int:
        """Self-attention and feed-forward."""
        tokens = batch * length
        attention = self.attention(batch, length, length, rotated=self.config.positions == "rotary")
        return 2 * self.sublayer(tokens) + attention + self.feed_forward(tokens)

    def loss(self, tokens: int, vocabulary: int) -> int:
        """The logarithms of all probabilities, and the number of targets."""
        return (tokens * vocabulary + 1) * self.size
