"""Each scheme draws the variance it promises, and that variance does what it is for."""

import math

import pytest
import torch
import torch.nn.functional as F

from labs.models.configuration import EncoderDecoderConfig, GPTConfig
from labs.models.encoder_decoder import EncoderDecoder
from labs.models.gpt import GPT

SIZES = {"width": 64, "heads": 4, "kv_heads": 2, "vocabulary": 300, "context": 80, "tied": False}


def promised(scheme, name, shape, layers):
    """The docstring of initialization.py, once more."""
    if name == "embedding.tokens.weight":
        return 0.02**2
    if name == "embedding.positions.weight":
        return 0.01**2
    outputs, inputs = shape
    if scheme == "xavier":
        return 2 / (inputs + outputs)
    if scheme == "kaiming":
        return 2 / inputs
    return 0.02**2 / (2 * layers) if name.endswith(("attention.output.weight", "down.weight")) else 0.02**2


@pytest.mark.parametrize("scheme", ["gpt2", "xavier", "kaiming"])
def test_variance(scheme):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES, layers=3, initialization=scheme, activation="swiglu"))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (1 if name.endswith("norm.weight") else 0)).all(), name
            continue
        expected = promised(scheme, name, parameter.shape, layers=3)
        # Of n draws the variance has a relative deviation of sqrt(2 / n), the mean one of 1 / sqrt(n).
        sampling = math.sqrt(2 / parameter.numel())
        assert parameter.var().item() == pytest.approx(expected, rel=4.5 * sampling), name
        assert abs(parameter.mean().item()) < 4.5 * math.sqrt(expected / parameter.numel()), name


def test_residual_sums_are_counted_for_each_stack():
    torch.manual_seed(0)
    config = EncoderDecoderConfig(
        width=128, encoder_layers=2, decoder_layers=4, initialization="gpt2", tied=False
    )
    model = EncoderDecoder(config)
    for layer, sums in (
        (model.encoder.blocks[1].feed_forward.down, 4),
        (model.decoder.blocks[3].attention.output, 12),
        (model.decoder.blocks[0].cross_attention.output, 12),
        (model.decoder.blocks[0].feed_forward.down, 12),
        (model.decoder.blocks[0].cross_attention.query, 1),
    ):
        assert layer.weight.var().item() == pytest.approx(0.02**2 / sums, rel=0.05)
    assert model.source_embedding.tokens.weight.var().item() == pytest.approx(1 / 128, rel=0.05)


def test_gpt2_keeps_the_stream_whatever_the_depth():
    """All blocks together add as much at 2 layers as at 24; unscaled they would add 12 times as much."""
    added = []
    for layers in (2, 24):
        torch.manual_seed(0)
        model, x = GPT(GPTConfig(**SIZES, layers=layers)), torch.randn(4, 64, 64)
        after = x
        for block in model.blocks:
            after = block(after)
        added.append((after - x).var().item())
    assert added[1] / added[0] == pytest.approx(1, abs=0.3)


def test_xavier_keeps_the_variance_both_ways():
    """Through linear layers of changing width, forwards and backwards, on average of the two."""
    torch.manual_seed(0)
    config = GPTConfig(width=128, hidden=128, initialization="xavier", layers=24, heads=1)
    layers = [block.feed_forward.up for block in GPT(config).blocks]
    x = y = torch.randn(512, 128)
    for layer in layers:
        y = F.linear(y, layer.weight)
    for layer in reversed(layers):
        x = x @ layer.weight
    assert 0.5 < y.var().item() < 2
    assert 0.5 < x.var().item() < 2


def test_kaiming_keeps_the_mean_square_through_relu():
    torch.manual_seed(0)
    config = GPTConfig(width=256, hidden=256, initialization="kaiming", layers=12, heads=1, activation="relu")
    x = y = torch.randn(64, 256).relu() * math.sqrt(2)
    for block in GPT(config).blocks:
        y = block.feed_forward.activate(F.linear(y, block.feed_forward.up.weight))
    assert 0.25 < (y.square().mean() / x.square().mean()).item() < 4  # 2^-12 with a variance of 1 / n
