"""How much smaller each form is, and its bytes, from a GPT's configuration alone (no torch is loaded).

``weight_bytes`` is what a file of the form holds, to the byte; ``read_bytes`` what one token must read of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from labs.models.configuration import GPTConfig

KEEP = 0.5  # of heads and hidden neurons, structured
SPARSITY = 0.5  # of weights dropped, unstructured
RANK_SHARE = 0.5  # of the numbers of a matrix that its two factors hold
ADAPTER_RANK = 8
GROUP = 64  # weights that share an int4 scale
THRESHOLD = 0.8  # probability at which a token leaves early
FLOAT = 4  # bytes


@dataclass(frozen=True)
class Matrix:
    out: int
    size: int

    @property
    def numbers(self) -> int:
        return self.out * self.size


def student_of(config: GPTConfig) -> GPTConfig:
    """Half as wide, half as deep: about an eighth of the weights."""
    return replace(
        config, width=config.width // 2, heads=max(1, config.heads // 2), layers=max(1, config.layers // 2)
    )


def structured_of(config: GPTConfig, keep: float = KEEP) -> GPTConfig:
    heads, hidden = max(1, round(keep * config.heads)), max(1, round(keep * config.size_of_hidden))
    return replace(config, heads=heads, kv_heads=None, head_dim=config.size_of_head, hidden=hidden)


def matrices(config: GPTConfig) -> list[Matrix]:
    """Of one block: query, key, value, output, up, down."""
    heads, keys = config.heads * config.size_of_head, config.key_heads * config.size_of_head
    width, hidden = config.width, config.size_of_hidden
    attention = [Matrix(heads, width), Matrix(keys, width), Matrix(keys, width), Matrix(width, heads)]
    return [*attention, Matrix(hidden, width), Matrix(width, hidden)]


def other_numbers(config: GPTConfig) -> int:
    """Biases and norms of the blocks, last norm, embedding (which is the head too) and positions."""
    block = sum(matrix.out for matrix in matrices(config)) + 4 * config.width
    return config.layers * block + (2 + config.vocabulary + config.context) * config.width


def rank_of(out: int, size: int, share: float) -> int:
    """The largest rank whose two factors hold at most ``share`` of the numbers of an (out, size) matrix."""
    return max(1, int(share * out * size / (out + size)))


def matrix_bytes(matrix: Matrix, form: str) -> float:
    """Of one matrix in a form of ``FORMS``."""
    numbers = matrix.numbers
    if form == "bfloat16":
        return 2 * numbers
    if form == "int8":
        return numbers + FLOAT * matrix.out
    if form == "int4":
        return numbers // 2 + FLOAT * numbers // GROUP
    if form == "pruned":  # in a file: a bit a weight, and what is left
        return -(-numbers // 8) + FLOAT * (numbers - round(SPARSITY * numbers))
    if form == "sparse":  # in memory: a value and a column for what is left, and where rows begin
        return 2 * FLOAT * (numbers - round(SPARSITY * numbers)) + FLOAT * (matrix.out + 1)
    if form == "low_rank":
        return FLOAT * rank_of(matrix.out, matrix.size, RANK_SHARE) * (matrix.out + matrix.size)
    if form == "lora":
        return FLOAT * (numbers + ADAPTER_RANK * (matrix.out + matrix.size))
    return FLOAT * numbers


def config_of(config: GPTConfig, form: str) -> GPTConfig:
    """The model that is computed: a smaller one for a student and after structured pruning."""
    if form in ("distilled", "alone"):
        return student_of(config)
    return structured_of(config) if form in ("structured", "healed") else config


def block_bytes(config: GPTConfig, form: str) -> float:
    """Matrices of one block of ``config_of``'s model."""
    return sum(matrix_bytes(matrix, form) for matrix in matrices(config_of(config, form)))


def file_bytes(config: GPTConfig, form: str) -> float:
    """What a file holds. An early exit adds its own norm and head; forms of the cache alone add nothing."""
    small = config_of(config, form)
    others = other_numbers(small) * (2 if form == "bfloat16" else FLOAT)
    extra = FLOAT * (2 + config.vocabulary) * config.width if form == "early_exit" else 0
    return small.layers * block_bytes(config, form) + others + extra


def token_bytes(config: GPTConfig, form: str) -> float:
    """What one token reads: all matrices, the head, biases and norms. Early exit: of a token that leaves.

    One that leaves reads half of the blocks and, for its keys and values, two matrices of each other one.
    """
    small = config_of(config, form)
    width = 2 if form == "bfloat16" else FLOAT
    others = width * (other_numbers(small) - (small.context - 1) * small.width)
    if form != "early_exit":
        return small.layers * block_bytes(config, form) + others
    skipped = small.layers - small.layers // 2
    per_block = block_bytes(config, form)
    _, key, value, *_ = matrices(small)
    return (small.layers - skipped) * per_block + skipped * FLOAT * (key.numbers + value.numbers) + others


def cache_bytes_per_token(heads: int, dim: int, bits: int) -> float:
    """Of keys and values of one block: integers, and a float32 scale a head where there are fewer than 16
    bits."""
    return 2 * heads * (dim * bits / 8 + (4 if bits < 16 else 0))
