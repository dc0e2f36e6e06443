"""The smaller forms of a GPT: against what they stand for, their bytes against their tensors, their files."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from labs.models.configuration import GPTConfig
from labs.models.gpt import GPT
from labs.models.trained import named_tensors
from labs.precision import compress, forms, layers, sizes, storage
from labs.precision.cache import StoredCache, quantize, with_cache_of
from labs.precision.early_exit import EarlyExit
from labs.precision.exact import in_float64
from labs.precision.model import tokens_per_round
from labs.precision.quality import bits_per_byte, held_out
from labs.precision.speculative import speculate
from labs.precision.training import distillation

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = GPTConfig(width=128, heads=4, layers=2, context=32, vocabulary=50)
STORED = (
    "float32",
    "bfloat16",
    "int8",
    "int4",
    "pruned",
    "structured",
    "low_rank",
    "distilled",
    "early_exit",
)


def model(config=SMALL, seed=0):
    """Weights ten times as large as at the start of a training, so that logits differ, and biases too."""
    torch.manual_seed(seed)
    made = GPT(config)
    for parameter in made.parameters():
        parameter.requires_grad_(False)
        parameter.add_(0.2 * torch.randn(parameter.shape))
    return made.eval()


def tokens(count=20, batch=1, seed=0):
    return torch.randint(50, (batch, count), generator=torch.Generator().manual_seed(seed))


# --- bytes and files -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", STORED)
def test_a_file_has_the_predicted_bytes_and_gives_back_every_bit(form, tmp_path):
    made = forms.large(SMALL, form) if form in ("distilled", "early_exit") else forms_of(form)
    assert storage.write(made, tmp_path / "model", masks=form == "pruned") == sizes.file_bytes(SMALL, form)
    poisoned = copy.deepcopy(made)
    for tensor in named_tensors(poisoned).values():
        tensor.fill_(math.nan if tensor.is_floating_point() else 77)
    back = storage.read(poisoned, tmp_path / "model")
    for name, tensor in named_tensors(back).items():
        assert tensor.equal(named_tensors(made)[name]), name
    size = (tmp_path / "model").stat().st_size
    assert 0 < size - sizes.file_bytes(SMALL, form) < 10_000  # its header


def forms_of(form):
    base = model()
    makes = {
        "float32": lambda: base,
        "bfloat16": lambda: compress.halved(base),
        "int8": lambda: compress.quantized(base, 8, sizes.GROUP),
        "int4": lambda: compress.quantized(base, 4, sizes.GROUP),
        "pruned": lambda: compress.pruned(base, sizes.SPARSITY),
        "structured": lambda: compress.structured(base, sizes.KEEP),
        "low_rank": lambda: compress.low_rank(base, sizes.RANK_SHARE),
    }
    return makes[form]()


@pytest.mark.parametrize(
    "form", ["float32", "bfloat16", "int8", "int4", "structured", "low_rank", "sparse", "lora"]
)
def test_a_token_reads_what_the_tensors_hold(form):
    tensors = named_tensors(forms.large(SMALL, form)).values()
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    positions = (SMALL.context - 1) * SMALL.width * (2 if form == "bfloat16" else 4)  # one row is read
    assert sizes.token_bytes(SMALL, form) == held - positions


def test_a_file_of_another_form_is_refused(tmp_path):
    storage.write(forms_of("int8"), tmp_path / "int8")
    with pytest.raises(ValueError, match=r"another form: blocks\.0\.attention\.key\.scale is only in one"):
        storage.read(model(), tmp_path / "int8")
    other = forms_of("structured")
    storage.write(other, tmp_path / "half")
    with pytest.raises(ValueError, match=r"blocks\.0.* the form's torch.float32"):
        storage.read(model(), tmp_path / "half")
    with pytest.raises(ValueError, match="no file of a model"):
        storage.read(other, tmp_path / "none")


# --- forms against what they stand for -----------------------------------------------------------


@pytest.mark.parametrize("form", ["float32", "int8", "int4", "pruned", "structured", "low_rank"])
def test_the_fast_way_is_the_stored_weights_in_float64(form):
    made = forms_of(form)
    exact = in_float64(made)(tokens())
    assert exact.dtype is torch.float64
    assert (made(tokens()) - exact).abs().max() < 1e-4 * exact.abs().max()
    assert made(tokens()).dtype is torch.float32  # its own tensors stayed what they were


def test_making_a_form_leaves_the_model_alone():
    base = model()
    before = {name: tensor.clone() for name, tensor in named_tensors(base).items()}
    for make in (
        lambda: compress.quantized(base, 4, 64),
        lambda: compress.structured(base, 0.5),
        lambda: compress.adapted(base, 4),
        lambda: compress.pruned(base, 0.5),
        lambda: compress.halved(base),
        lambda: with_cache_of(base, 4),
        lambda: in_float64(base),
    ):
        make()
        now = named_tensors(base)
        assert all(now[name].equal(tensor) for name, tensor in before.items())
    assert base.blocks[0].attention.attend is F.scaled_dot_product_attention


def test_structured_pruning_is_the_model_with_the_other_heads_and_neurons_at_zero():
    base = model()
    small = compress.structured(base, 0.5)
    assert small.config.heads == 2
    assert small.config.size_of_hidden == 256
    silenced = copy.deepcopy(base)
    for block, kept in zip(silenced.blocks, small.blocks, strict=True):
        for weight, fewer in (
            (block.attention.output.weight, kept.attention.output.weight),
            (block.feed_forward.down.weight, kept.feed_forward.down.weight),
        ):
            alive = (weight.t()[:, None] == fewer.t()[None]).all(-1).any(1)
            assert int(alive.sum()) == fewer.shape[1]
            weight[:, ~alive] = 0
    torch.testing.assert_close(small(tokens()), silenced(tokens()), rtol=1e-4, atol=1e-4)


def test_structured_pruning_keeps_the_heads_that_add_most():
    base = model()
    for block in base.blocks:
        block.attention.output.weight.view(128, 4, 32)[:, 2] *= 100
        block.attention.output.weight.view(128, 4, 32)[:, 0] *= 50
    small = compress.structured(base, 0.5)
    wanted = base.blocks[0].attention.value.weight.view(4, 32, 128)[[0, 2]].flatten(0, 1)
    assert small.blocks[0].attention.value.weight.equal(wanted)
    with pytest.raises(ValueError, match="without SwiGLU"):
        compress.structured(model(replace(SMALL, activation="swiglu")), 0.5)


@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.integers(0, 99))
def test_pruning_drops_exactly_as_many_and_the_smallest(rows, columns, sparsity, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-5, 6, (rows, columns), generator=generator).float()  # with ties
    kept = layers.kept_by_magnitude(weight, sparsity)
    dropped = round(sparsity * rows * columns)
    assert int((~kept).sum()) == dropped
    if 0 < dropped < rows * columns:
        assert weight[~kept].abs().max() <= weight[kept].abs().min()


def test_rows_with_columns_are_the_pruned_matrix():
    base = model()
    dense, rows = compress.pruned(base, 0.5), compress.sparse(base, 0.5)
    torch.testing.assert_close(rows(tokens()), dense(tokens()), rtol=1e-4, atol=1e-4)
    assert rows.blocks[0].feed_forward.up.exact().equal(dense.blocks[0].feed_forward.up.weight.double())


@settings(max_examples=20)
@given(st.integers(2, 40), st.integers(2, 40), st.floats(0.1, 1.0))
def test_factors_hold_at_most_their_share_and_err_by_the_singular_values_left_out(out, size, share):
    linear = torch.nn.Linear(size, out, bias=False, dtype=torch.float64)
    made = layers.LowRankLinear.from_linear(linear, share)
    rank = sizes.rank_of(out, size, share)
    assert made.down.shape == (rank, size)
    assert rank == 1 or rank * (out + size) <= share * out * size
    left_out = torch.linalg.svdvals(linear.weight.detach())[rank:]
    error = (made.exact() - linear.weight.detach()).norm()
    assert error == pytest.approx(float(left_out.norm()), abs=1e-9)


def test_lora_starts_as_the_model_and_merges_into_what_it_computes():
    base = model()
    made = compress.adapted(base, 4)
    assert made(tokens()).equal(base(tokens()))
    for name, parameter in made.named_parameters():
        if name.endswith(".up"):
            parameter.data.normal_()
    whole = compress.merged(made)
    assert (made(tokens()) - base(tokens())).abs().max() > 0.1
    torch.testing.assert_close(whole(tokens()), made(tokens()), rtol=1e-3, atol=1e-3)
    assert {type(layer) for layer in whole.modules()}.isdisjoint({layers.LoRALinear})


# --- the cache -----------------------------------------------------------------------------------


@given(st.sampled_from([8, 4]), st.integers(0, 99))
def test_a_quantised_token_is_off_by_half_a_step_at_most_and_uses_every_level(bits, seed):
    values = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(seed))
    integers, scale = quantize(values, bits)
    assert ((integers * scale - values).abs() <= 0.5001 * scale).all()
    assert (integers.abs().amax(-1) == {8: 127, 4: 7}[bits]).all()
    with pytest.raises(ValueError, match="bits=3"):
        quantize(values, 3)


@pytest.mark.parametrize(("form", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2), ("int8", 1e-5)])
def test_a_stored_cache_attends_to_what_it_stores(form, tolerance):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 3, 32, generator=generator)
    keys, values = (torch.randn(2, 3, 70, 32, generator=generator) for _ in range(2))
    kept = [keys, values]
    if form == "bfloat16":
        kept = [each.bfloat16().float() for each in kept]
    if form == "int8":
        kept = [integers * scale for integers, scale in (quantize(each, 8) for each in (keys, values))]
    expected = F.scaled_dot_product_attention(query[:, :, None], *kept)[:, :, 0]
    found = StoredCache(keys, values, form).attend(query)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_a_model_with_a_small_cache_attends_to_rounded_keys_and_values():
    base = model()
    eight, four = (with_cache_of(base, bits)(tokens()) for bits in (8, 4))
    off = [float((each - base(tokens())).abs().max()) for each in (eight, four)]
    assert 0 < 4 * off[0] < off[1]


# --- early exit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
def test_all_tokens_at_once_are_the_tokens_one_by_one(threshold):
    early = EarlyExit(model(replace(SMALL, layers=3)).double(), 1, threshold).double()
    text = tokens(30)
    logits, left = early(text)
    share = float(left.float().mean())
    assert {0.0: share == 1, 0.3: 0.1 < share < 0.9, 1.0: share == 0}[threshold], share
    cache = early.model.new_cache(30)
    for place in range(30):
        one, leaves = early.decode(text[:, place : place + 1], cache)
        assert leaves == bool(left[0, place])
        torch.testing.assert_close(one[0, 0], logits[0, place])
    assert early.share_leaving(text) == pytest.approx(share)


def test_nobody_leaves_at_a_probability_of_one():
    base = model()
    assert EarlyExit(base, 1, 1.0)(tokens())[0].equal(base(tokens()))
    with pytest.raises(ValueError, match="depth=2"):
        EarlyExit(base, 2, 0.5)
    with pytest.raises(ValueError, match="threshold=2"):
        EarlyExit(base, 1, 2)


# --- speculative decoding ------------------------------------------------------------------------


@settings(max_examples=15)
@given(st.integers(1, 5), st.integers(0, 12), st.integers(1, 8), st.floats(0, 0.5), st.integers(0, 9))
def test_speculation_gives_the_large_models_own_tokens(lookahead, count, length, noise, seed):
    """Whatever the draft: the same model, one that is a little off, one that is far off."""
    target = model(replace(SMALL, width=32, layers=1), seed).double()
    draft = copy.deepcopy(target)
    for parameter in draft.parameters():
        parameter.add_(noise * torch.randn(parameter.shape))
    prompt = tokens(length, seed=seed)
    found = speculate(target, draft, prompt, count, lookahead)
    assert found.tokens.equal(target.generate(prompt, count))
    assert found.rounds + found.accepted == count
    assert found.accepted <= found.judged <= found.accepted + found.rounds
    assert found.judged <= lookahead * found.rounds
    if noise == 0:
        assert found.rounds == -(-count // (lookahead + 1))
        assert found.judged == found.accepted


def test_what_cannot_be_decoded_is_refused():
    target = model()
    for prompt, count, lookahead in (
        (tokens(3, 2), 2, 2),
        (tokens(0), 2, 2),
        (tokens(3), 2, 0),
        (tokens(3), -1, 1),
    ):
        with pytest.raises(ValueError, match="one sequence of at least 1 token"):
            speculate(target, target, prompt, count, lookahead)
    with pytest.raises(ValueError, match="33 tokens do not fit the context of 32"):
        speculate(target, target, tokens(3), 30, 2)


@given(st.floats(0, 1), st.integers(1, 8))
def test_tokens_of_a_round_are_the_sum_over_how_many_are_right(acceptance, lookahead):
    """At least j proposals are right with probability a^j; one token comes on top."""
    expected = 1 + sum(acceptance**j for j in range(1, lookahead + 1))
    assert tokens_per_round(acceptance, lookahead) == pytest.approx(expected, rel=1e-6)


# --- quality and distillation --------------------------------------------------------------------


def test_a_model_that_knows_nothing_needs_eight_bits():
    text, targets = held_out(20, 16)
    bits = bits_per_byte(lambda some: torch.zeros(*some.shape, 256), text, targets)
    assert bits.shape == (20,)
    assert bits.tolist() == pytest.approx([8.0] * 20)
    sure = bits_per_byte(
        lambda some: 100.0 * F.one_hot(targets[:16] if len(some) == 16 else targets[16:], 256), text, targets
    )
    assert sure.max() < 1e-6


def test_held_out_text_is_of_the_validation_files_and_does_not_overlap():
    from labs.models.text import standard_library

    text, targets = held_out(50, 64)
    assert text[:, 1:].equal(targets[:, :-1])
    held = bytes(standard_library().validation.tolist())
    assert bytes(text[7].tolist()) in held
    with pytest.raises(ValueError, match="windows of 64 bytes, not"):
        held_out(10**6, 64)


def test_a_student_that_agrees_with_its_teacher_pays_for_the_text_alone():
    logits, targets = torch.randn(2, 3, 50), tokens(3, 2)
    half = 0.5 * F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(distillation(logits, logits, targets), half)
    teacher = -logits
    p, q = ((each.double().flatten(0, 1) / 2).softmax(-1) for each in (teacher, logits))
    divergence = float((p * (p / q).log()).sum(-1).mean())
    expected = half + 0.5 * 2**2 * divergence
    torch.testing.assert_close(distillation(logits, teacher, targets), expected)
