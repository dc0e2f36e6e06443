"""The encoder-decoder is torch.nn.Transformer on the same weights, decodes from caches, and learns."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from labs.models.configuration import EncoderDecoderConfig
from labs.models.encoder_decoder import EncoderDecoder

NEAR = {"rtol": 1e-11, "atol": 1e-13}


def small(**options):
    sizes = {"width": 16, "heads": 4, "hidden": 24, "context": 12, "encoder_layers": 3, "decoder_layers": 2}
    return EncoderDecoderConfig(**sizes | {"source_vocabulary": 13, "target_vocabulary": 13} | options)


def pair(source=(3, 7), target=(3, 5)):
    generator = torch.Generator().manual_seed(1)
    return (torch.randint(13, size, generator=generator) for size in (source, target))


def copy_attention(ours, torchs):
    with torch.no_grad():
        for mine, part in zip(
            (ours.query, ours.key, ours.value), torchs.in_proj_weight.chunk(3), strict=True
        ):
            mine.weight.copy_(part)
        ours.output.weight.copy_(torchs.out_proj.weight)
        if torchs.in_proj_bias is not None:
            biases = torchs.in_proj_bias.chunk(3)
            for mine, part in zip((ours.query, ours.key, ours.value), biases, strict=True):
                mine.bias.copy_(part)
            ours.output.bias.copy_(torchs.out_proj.bias)


def copy_weights(ours, torchs):
    """From nn.Transformer into the stacks of ours."""
    for mine, other, norms in (
        (ours.encoder, torchs.encoder, ("attention_norm", "feed_forward_norm")),
        (ours.decoder, torchs.decoder, ("attention_norm", "cross_attention_norm", "feed_forward_norm")),
    ):
        for block, layer in zip(mine.blocks, other.layers, strict=True):
            copy_attention(block.attention, layer.self_attn)
            if block.cross_attention is not None:
                copy_attention(block.cross_attention, layer.multihead_attn)
            block.feed_forward.up.load_state_dict(layer.linear1.state_dict())
            block.feed_forward.down.load_state_dict(layer.linear2.state_dict())
            for index, name in enumerate(norms):
                getattr(block, name).load_state_dict(getattr(layer, f"norm{index + 1}").state_dict())
        mine.norm.load_state_dict(other.norm.state_dict())


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_position", ["post", "pre"])
def test_is_torchs_transformer(norm_position, activation, bias):
    """States and gradients, of both inputs and some weights, with and without padding."""
    torch.manual_seed(0)
    config = small(norm_position=norm_position, activation=activation, bias=bias, final_norm=True)
    ours = EncoderDecoder(config).double()
    torchs = nn.Transformer(
        16, 4, 3, 2, 24, 0.0, activation, batch_first=True, norm_first=norm_position == "pre", bias=bias
    ).double()  # fmt: skip
    with torch.no_grad():
        for parameter in torchs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    copy_weights(ours, torchs)
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    real = torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    for mask in (None, real):
        inputs = [torch.randn(3, length, 16, dtype=torch.float64, requires_grad=True) for length in (7, 5)]
        padding = None if mask is None else ~mask
        expected = torchs(
            *inputs, tgt_mask=causal, src_key_padding_mask=padding, memory_key_padding_mask=padding
        )
        seen = None if mask is None else mask[:, None, None, :]
        memory = ours.encoder(inputs[0], mask=seen)
        got = ours.decoder(inputs[1], memory=memory, memory_mask=seen)
        torch.testing.assert_close(got, expected, **NEAR)
        weights = (
            (
                ours.encoder.blocks[0].attention.output.weight,
                torchs.encoder.layers[0].self_attn.out_proj.weight,
            ),
            (ours.decoder.blocks[1].feed_forward.up.weight, torchs.decoder.layers[1].linear1.weight),
            (ours.decoder.norm.weight, torchs.decoder.norm.weight),
        )
        weight = torch.randn_like(got)
        mine = torch.autograd.grad((got * weight).sum(), [*inputs, *(pair[0] for pair in weights)])
        theirs = torch.autograd.grad((expected * weight).sum(), [*inputs, *(pair[1] for pair in weights)])
        torch.testing.assert_close(mine, theirs, **NEAR)


def test_parts_make_the_whole():
    """Embeddings scaled, sinusoids added, stacks, head: forward is what its docstring draws."""
    torch.manual_seed(0)
    model = EncoderDecoder(small()).double().eval()
    source, target = pair()
    table = model.head.weight
    assert table is model.source_embedding.tokens.weight is model.target_embedding.tokens.weight
    place = (
        torch.arange(12, dtype=torch.float64)[:, None] / 10_000 ** (torch.arange(0, 16, 2) / 16.0).double()
    )
    sinusoids = torch.stack((place.sin(), place.cos()), -1).flatten(1)
    states = [table[tokens] * 4 + sinusoids[: tokens.shape[1]] for tokens in (source, target)]
    expected = model.decoder(states[1], memory=model.encoder(states[0])) @ table.T
    torch.testing.assert_close(model(source, target), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary"])
def test_cached_decoding_is_the_whole_forward_pass(positions):
    torch.manual_seed(0)
    model = EncoderDecoder(small(positions=positions, kv_heads=2, activation="swiglu", norm="rms")).double()
    source, target = pair()
    real = torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    expected = model(source, target, real)
    with torch.no_grad():
        memory, caches = model.encode(source, real), model.new_caches(7)
        parts = [model.decode(part, memory, real, caches) for part in target.split((2, 1, 2), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, **NEAR)
    padded = source.clone()
    padded[~real] = 12
    torch.testing.assert_close(model(padded, target, real), expected, **NEAR)
    changed = target.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 13
    assert (model(source, changed, real) != expected).any(-1).any(0).tolist() == [False] * 3 + [True] * 2


def test_learns_to_reverse():
    """Sequences it has not seen come out backwards, one token at a time from the caches."""
    torch.manual_seed(0)
    config = small(width=32, hidden=64, encoder_layers=1, decoder_layers=1, positions="learned")
    model, start, length, steps = EncoderDecoder(config), 12, 4, 120
    optimizer = torch.optim.AdamW(model.parameters(), 2e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=steps)
    for _ in range(steps):
        source = torch.randint(12, (64, length))
        target = source.flip(1)
        shifted = torch.cat((torch.full((64, 1), start), target[:, :-1]), 1)
        loss = F.cross_entropy(model(source, shifted).flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    source = torch.randint(12, (200, length))
    right = (model.eval().generate(source, start, length) == source.flip(1)).all(1)
    assert right.float().mean() > 0.95, loss


def test_bad_calls():
    model = EncoderDecoder(small())
    source, target = pair()
    with pytest.raises(ValueError, match=r"13 tokens do not fit the context of 12.*context=13"):
        model(source, torch.zeros(3, 13, dtype=torch.long))
    with pytest.raises(ValueError, match="13 tokens do not fit"):
        model(torch.zeros(3, 13, dtype=torch.long), target)
    with pytest.raises(ValueError, match="count=13 tokens; the context allows 1 to 12"):
        model.generate(source, 0, 13)
