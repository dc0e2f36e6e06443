"""The GPT: every combination of its options decodes from the cache what it computes at once, and more."""

import copy
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from model_options import ALL, CHOICES, LLAMA, SAMPLE
from torch import nn

from labs.models.attention import Attention, KeyValueCache
from labs.models.configuration import GPTConfig, RotaryScaling
from labs.models.gpt import GPT
from labs.models.layers import Block
from labs.models.positions import rotary_embedding, rotary_frequencies, rotation, sinusoids


def small(**options):
    return GPTConfig(**{"width": 16, "heads": 4, "layers": 2, "context": 12, "vocabulary": 11} | options)


def double(**options):
    torch.manual_seed(0)
    return GPT(small(**options)).double().eval()


def tokens(batch=2, length=9, vocabulary=11):
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


def check(options):
    model, text = double(**options), tokens()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms of another value than at the start
            parameter.add_(0.1 * torch.randn_like(parameter))
    logits = model(text)
    assert logits.shape == (2, 9, 11)
    F.cross_entropy(logits.flatten(0, 1), text.roll(-1, 1).flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # A key's bias moves all scores of a query alike: softmax does not see it, unless it is rotated.
        blind = name.endswith("key.bias") and options["positions"] != "rotary"
        assert parameter.grad.abs().max() < 1e-14 if blind else parameter.grad.abs().max() > 1e-12, name
    with torch.no_grad():
        cache = model.new_cache()
        pieces = [model(part, cache=cache) for part in text.split((4, 1, 3, 1), 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), logits, rtol=1e-12, atol=1e-13)
        changed = text.clone()
        changed[:, 5] = (changed[:, 5] + 1) % 11
        different = (model(changed) != logits).any(-1).any(0)
        assert different.tolist() == [False] * 5 + [True] * 4  # a token is seen from itself on
        for dtype, size in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
            rounded = copy.deepcopy(model).to(dtype)(text)
            assert rounded.dtype == dtype
            error = (rounded.double() - logits).norm() / logits.norm()
            assert error < size, dtype


@pytest.mark.parametrize("options", SAMPLE, ids=lambda options: "-".join(map(str, options.values())))
def test_options_in_combination(options):
    check(options)


@pytest.mark.proof
@pytest.mark.timeout(900)
def test_all_options_in_combination():
    for options in ALL:
        try:
            check(options)
        except Exception as error:
            raise AssertionError(f"{options}: {error}") from error


def test_shared_key_heads_are_repeated_ones():
    """Grouped attention is multi-head attention whose key and value heads are equal within a group."""
    for kv_heads in (1, 2):
        shared, full = double(kv_heads=kv_heads), double()
        state = shared.state_dict()
        for name in list(state):
            if ".key." in name or ".value." in name:
                heads = state[name].unflatten(0, (kv_heads, 4))
                state[name] = heads.repeat_interleave(4 // kv_heads, 0).flatten(0, 1)
        full.load_state_dict(state)
        torch.testing.assert_close(shared(tokens()), full(tokens()), rtol=1e-12, atol=1e-14)


def plain_attention(module, x, memory, causal, mask=None):
    """In loops over sequences and heads, scores written out."""
    size, states = module.size_of_head, []
    for index in range(len(x)):
        outputs = []
        for head in range(4):
            rows = slice(head * size, (head + 1) * size)
            query, key, value = (
                F.linear(source[index], layer.weight[rows], layer.bias[rows])
                for layer, source in ((module.query, x), (module.key, memory), (module.value, memory))
            )
            scores = query @ key.T / math.sqrt(size)
            if causal:
                scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -math.inf)
            if mask is not None:
                scores = scores.masked_fill(~mask[index], -math.inf)
            outputs.append(scores.softmax(-1) @ value)
        states.append(module.output(torch.cat(outputs, -1)))
    return torch.stack(states)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_its_formula(causal):
    torch.manual_seed(0)
    module = Attention(small(), causal).double()
    x, memory = torch.randn(2, 5, 16).double(), torch.randn(2, 7, 16).double()
    mask = torch.rand(2, 1, 5) > 0.3
    mask[..., 0] = True
    near = {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(module(x), plain_attention(module, x, x, causal), **near)
    masked = module(x, mask=mask[:, None])
    torch.testing.assert_close(masked, plain_attention(module, x, x, causal, mask), **near)
    if not causal:
        torch.testing.assert_close(module(x, memory), plain_attention(module, x, memory, causal), **near)


def test_a_part_of_the_heads_is_a_module_too():
    """Two halves of the heads, as tensor parallelism holds them, add up to the whole; so do their caches."""
    torch.manual_seed(0)
    config = small(kv_heads=2, positions="rotary", bias=False)
    whole = Attention(config, causal=True).double()
    x = torch.randn(2, 6, 16).double()
    turn = rotation(config, torch.arange(6), x.dtype)
    total = 0
    for half in range(2):
        part = copy.deepcopy(whole)
        for layer in (part.query, part.key, part.value):
            layer.weight = nn.Parameter(layer.weight.chunk(2, 0)[half])
        part.output.weight = nn.Parameter(part.output.weight.chunk(2, 1)[half])
        cache = KeyValueCache(6)
        total = total + part(x, rotation=turn, cache=cache)
        assert cache.read()[0].shape == (2, 1, 6, 4)
    torch.testing.assert_close(total, whole(x, rotation=turn), rtol=1e-12, atol=1e-14)


def test_attend_can_be_replaced():
    """A ring over ranks comes in here: the function gets what scaled_dot_product_attention gets."""
    model, calls = double(dropout=0.25), []

    def attend(query, key, value, **options):
        calls.append((query.shape, options))
        return F.scaled_dot_product_attention(query, key, value, **options)

    expected = model(tokens())
    for block in model.blocks:
        block.attention.attend = attend
    assert torch.equal(model(tokens()), expected)
    model.train()(tokens())
    assert [options["dropout_p"] for _, options in calls] == [0.0, 0.0, 0.25, 0.25]
    assert all(shape == (2, 4, 9, 4) and options["is_causal"] for shape, options in calls)


def test_a_part_of_the_positions():
    """Positions are an input: a rank of context parallelism holds some, not the first ones perhaps."""
    for positions in CHOICES["positions"]:
        model = double(positions=positions)
        for block in model.blocks:
            block.attention.attend = lambda query, key, value, **_: value + query + key  # each for itself
        full, places = model(tokens()), torch.tensor([6, 1, 8])
        part = model(tokens()[:, places], positions=places)
        torch.testing.assert_close(part, full[:, places], rtol=1e-12, atol=1e-14)


def test_rotation():
    """Scores depend on the distance only; the published scaling of Llama 3.1, wavelength by wavelength."""
    config = small(positions="rotary", head_dim=8, rotary_base=100.0)
    cos, sin = rotation(config, torch.arange(12), torch.float64)
    assert cos.shape == sin.shape == (12, 4)
    query, key = torch.randn(2, 1, 8).double()
    turned = [rotary_embedding(x.expand(12, 8), cos, sin) for x in (query, key)]
    scores = turned[0] @ turned[1].T
    for distance in (-3, 0, 5):
        assert scores.diagonal(distance).std() < 1e-12
    angle = 3 * 100.0 ** (-2 / 8)
    x = torch.zeros(12, 8).double()
    x[3, 1] = 1
    assert rotary_embedding(x, cos, sin)[3, [1, 5]].tolist() == pytest.approx(
        [math.cos(angle), math.sin(angle)]
    )

    scaling = RotaryScaling(8.0, 1.0, 4.0, 32)
    scaled = rotary_frequencies(
        small(positions="rotary", head_dim=8, rotary_base=100.0, rotary_scaling=scaling)
    )
    for frequency, got in zip(rotary_frequencies(config).tolist(), scaled.tolist(), strict=True):
        wavelength = 2 * math.pi / frequency
        if wavelength < 32 / 4:
            expected = frequency
        elif wavelength > 32 / 1:
            expected = frequency / 8
        else:
            smooth = (32 / wavelength - 1) / (4 - 1)
            expected = (1 - smooth) * frequency / 8 + smooth * frequency
        assert got == pytest.approx(expected, rel=1e-14)
    linear = small(positions="rotary", head_dim=8, rotary_base=100.0, rotary_scaling=RotaryScaling(2.0))
    assert torch.equal(rotary_frequencies(linear), rotary_frequencies(config) / 2)


def test_bfloat16_does_not_round_positions():
    """Neighbours far out, where bfloat16 cannot tell positions apart, are still turned differently."""
    model = GPT(small(**LLAMA)).bfloat16()
    cos, _ = model.rotation(torch.arange(1000, 1012), torch.bfloat16)
    assert cos.dtype == torch.float32
    assert cos[:, 0].tolist() == pytest.approx([math.cos(place) for place in range(1000, 1012)], abs=1e-6)


def test_sinusoids():
    table = sinusoids(torch.arange(12), 6, torch.float64)
    for place, j in itertools.product(range(12), range(3)):
        angle = place / 10_000 ** (2 * j / 6)
        assert table[place, 2 * j : 2 * j + 2].tolist() == pytest.approx([math.sin(angle), math.cos(angle)])


def test_dropout():
    config = small(width=64, dropout=0.25, layers=1, context=128)
    block = GPT(config).blocks[0]
    x = torch.zeros(4, 100, 64)
    with torch.no_grad():
        block.feed_forward.down.bias.fill_(1.0)
    kept = block(x)  # attention gives zeros (bias 0 at the start), the feed-forward its last bias, scaled
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (kept == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(block.eval()(x), torch.ones_like(x))
    model, text = GPT(config), tokens(length=100)
    embedded = model.embedding(text, torch.arange(100))
    assert (embedded == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert not torch.equal(model(text), model(text))
    assert torch.equal(model.eval()(text), model(text))


def test_names_copies_and_tied_weights():
    model = double(**LLAMA)
    block = [
        "attention_norm.weight", "attention.query.weight", "attention.key.weight", "attention.value.weight",
        "attention.output.weight", "feed_forward_norm.weight", "feed_forward.gate.weight",
        "feed_forward.up.weight", "feed_forward.down.weight",
    ]  # fmt: skip
    outside = ["embedding.tokens.weight", "norm.weight"]
    expected = outside + [f"blocks.{index}.{name}" for index in range(2) for name in block]
    assert sorted(name for name, _ in model.named_parameters()) == sorted(expected)
    assert not list(model.buffers())
    assert isinstance(model.blocks, nn.ModuleList)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.head.weight is other.embedding.tokens.weight
        assert torch.equal(other(tokens()), model(tokens()))
    separate = GPT(small(tied=False))
    assert separate.head.weight is not separate.embedding.tokens.weight


def test_built_on_the_meta_device():
    """As a sharded model is: no memory before it is known which part of it to hold."""
    config = small(**LLAMA)
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu").reset_parameters(torch.Generator().manual_seed(3))
    other = GPT(config)
    other.reset_parameters(torch.Generator().manual_seed(3))
    assert model.head.weight is model.embedding.tokens.weight
    assert torch.equal(model(tokens()), other(tokens()))


@pytest.mark.proof  # importing the compiler alone takes seconds
def test_compiles_in_one_graph():
    model = double(**LLAMA)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens()), model(tokens()), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("options", [{}, LLAMA], ids=["gpt2", "llama"])
def test_small_models_with_our_kernels(options):
    """The namespace of kernels is a choice of the configuration, and gives the same."""
    check_kernels(options)


@pytest.mark.proof  # compiles them, where no test has before
@pytest.mark.timeout(600)
@pytest.mark.parametrize("options", [{}, LLAMA], ids=["gpt2", "llama"])
def test_our_kernels_themselves(options, monkeypatch):
    """Small tensors are torch's by default; without that the same model runs on the kernels."""
    monkeypatch.setattr("kernels.op.crossover", lambda name, device: 0)
    check_kernels(options)


def check_kernels(options):
    torch.manual_seed(0)
    model = GPT(small(**options, width=32))
    fused = GPT(small(**options, width=32, functional="kernels"))
    fused.load_state_dict(model.state_dict())
    losses = []
    text = tokens()
    for one in (model, fused):
        loss = F.cross_entropy(one(text).flatten(0, 1), text.flatten())
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for (name, mine), other in zip(model.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_learns():
    torch.manual_seed(0)
    model, text = GPT(small(width=32)), tokens(2, 13)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(40):
        loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2


def test_generates_the_likeliest():
    model, prompt = double(context=16), tokens(length=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # clear winners
    text = model.generate(prompt, 12)
    assert text.shape == (2, 16)
    assert torch.equal(text[:, :4], prompt)
    assert torch.equal(model(text).argmax(-1)[:, 3:-1], text[:, 4:])
    assert torch.equal(model.generate(prompt, 0), prompt)


def test_generates_by_chance():
    model, prompt = double(), torch.zeros(3000, 1, dtype=torch.long)
    drawn = model.generate(prompt, 1, temperature=0.5, generator=torch.Generator().manual_seed(0))[:, 1]
    again = model.generate(prompt, 1, temperature=0.5, generator=torch.Generator().manual_seed(0))[:, 1]
    assert torch.equal(drawn, again)
    share = torch.bincount(drawn, minlength=11) / 3000
    torch.testing.assert_close(share.double(), (model(prompt[:1])[0, 0] / 0.5).softmax(-1), rtol=0, atol=0.03)


def test_bad_calls():
    model = double()
    with pytest.raises(ValueError, match=r"13 tokens do not fit the context of 12.*context=13"):
        model(tokens(length=13))
    cache = model.new_cache()
    with torch.no_grad():
        model(tokens(length=12), cache=cache)
        with pytest.raises(ValueError, match="13 tokens do not fit"):
            model(tokens(length=1), cache=cache)
        cache = model.new_cache(4)
        with pytest.raises(ValueError, match="holds 0 of 4 tokens; 9 more need a capacity of 9"):
            model(tokens(), cache=cache)
        model(tokens(length=1), cache=cache)
        with pytest.raises(ValueError, match="holds 2 sequences, and 3 arrive"):
            model(tokens(3, 1), cache=cache)
    with pytest.raises(ValueError, match=r"9 tokens and 4 more.*at most 3"):
        model.generate(tokens(), 4)
    with pytest.raises(ValueError, match="at least 1 token"):
        model.generate(tokens(length=0), 1)
    with pytest.raises(ValueError, match=r"positions of shape \(3,\) for 9 tokens.*\(9,\)"):
        model(tokens(), positions=torch.arange(3))
    with pytest.raises(ValueError, match="empty"):
        KeyValueCache(3).read()
    with pytest.raises(ValueError, match="at least 1"):
        KeyValueCache(0)
    with pytest.raises(ValueError, match="needs memory"):
        Block(small(), cross=True)(torch.zeros(1, 2, 16))
