"""The GPT and the encoder-decoder as stages, with text to train on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from labs.models.configuration import EncoderDecoderConfig, GPTConfig
    from labs.pipeline.config import Config

SEED = 0


def configuration(config: Config, model: str) -> GPTConfig | EncoderDecoderConfig:
    """Of ``model``; half of the encoder-decoder's blocks are its encoder's."""
    from labs.models.configuration import EncoderDecoderConfig, GPTConfig
    from labs.pipeline.config import HEAD

    sizes: dict[str, Any] = {
        "width": config.width,
        "heads": config.width // HEAD,
        "context": config.length,
    }
    if model == "gpt":
        return GPTConfig(layers=config.layers, **sizes)
    half = config.layers // 2
    return EncoderDecoderConfig(encoder_layers=config.layers - half, decoder_layers=half, **sizes)


def stages_of(config: Config, model: str, count: int) -> list[Any]:
    """``count`` stages with as many blocks each as can be, the same whenever and wherever they are made.

    A block of the decoder does more than one of the encoder, and the last stage has the head: they differ.
    """
    import torch

    from labs.models.encoder_decoder import EncoderDecoder
    from labs.models.gpt import GPT
    from labs.models.stages import split_encoder_decoder, split_gpt

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        built: Any = GPT if model == "gpt" else EncoderDecoder
        whole = built(configuration(config, model))
    split: Any = split_gpt if model == "gpt" else split_encoder_decoder
    return split(whole, count)


def batch(config: Config, model: str, microbatches: int) -> tuple[Any, Any]:
    """(inputs, targets) of a step: text of the standard library, and for the encoder-decoder its beginning as
    source and what follows as target."""
    from labs.models.text import Batches, standard_library

    sequences = microbatches * config.sequences
    tokens, targets = Batches(standard_library().train, sequences, config.length, SEED)[0]
    return (tokens, targets) if model == "gpt" else ((tokens, tokens), targets)


def loss(logits: Any, targets: Any) -> Any:
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits.flatten(0, 1), targets.flatten())
