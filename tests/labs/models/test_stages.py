"""Stages, one after the other, are the model they were cut from."""

import pytest
import torch

from labs.models.configuration import EncoderDecoderConfig, GPTConfig
from labs.models.encoder_decoder import EncoderDecoder
from labs.models.gpt import GPT
from labs.models.stages import layers_of_stages, split_encoder_decoder, split_gpt

SMALL = dict(width=16, heads=2, context=8)


def through(stages, *inputs):
    for stage in stages:
        outputs = stage(*inputs)
        inputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return inputs[0]


def same_as(model, stages, *inputs):
    """Logits and all gradients, to the last bit; parameters are the model's own."""
    expected = model(*inputs)
    expected.square().mean().backward()
    gradients = {name: one.grad for name, one in model.named_parameters()}
    model.zero_grad()
    found = through(stages, *inputs)
    found.square().mean().backward()
    assert torch.equal(found, expected)
    for name, one in model.named_parameters():
        assert torch.equal(one.grad, gradients[name]), name
    ours = {id(one) for stage in stages for one in stage.parameters()}
    assert ours == {id(one) for one in model.parameters()}


@pytest.mark.parametrize("stages", [1, 2, 3, 5, (1, 3, 1)])
@pytest.mark.parametrize("positions", ["learned", "rotary", "sinusoidal"])
def test_gpt(stages, positions):
    model = GPT(GPTConfig(layers=5, positions=positions, tied=positions != "rotary", **SMALL))
    same_as(model, split_gpt(model, stages), torch.randint(0, 256, (2, 7)))


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5, (1, 4), (2, 3), (3, 1, 1), (1, 2, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_encoder_decoder(stages, masked):
    """Cuts within the encoder, between the two, and within the decoder."""
    model = EncoderDecoder(EncoderDecoderConfig(encoder_layers=2, decoder_layers=3, **SMALL))
    inputs = [torch.randint(0, 50, (2, 6)), torch.randint(0, 50, (2, 5))]
    if masked:
        inputs.append(torch.arange(6) < torch.tensor([[6], [4]]))
    same_as(model, split_encoder_decoder(model, stages), *inputs)


def test_layers_of_stages():
    assert layers_of_stages(7, 3) == [3, 2, 2]
    assert layers_of_stages(7, (1, 5, 1)) == [1, 5, 1]
    for stages, message in [
        (8, "7 layers cannot be cut into 8 stages; take 1 to 7"),
        (0, "into 0 stages"),
        ((3, 0, 4), "each must have at least one"),
        ((3, 3), "together they must have 7"),
        ((), "stages of no layers"),
    ]:
        with pytest.raises(ValueError, match=message):
            layers_of_stages(7, stages)


def test_too_many_tokens():
    stages = split_gpt(GPT(GPTConfig(layers=2, **SMALL)), 2)
    with pytest.raises(ValueError, match="9 tokens do not fit the context of 8"):
        stages[0](torch.zeros(1, 9, dtype=torch.int64))
