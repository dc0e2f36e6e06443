"""Seconds of a training step: each part with numbers that are stated."""

from dataclasses import replace

import pytest
from stated import machine

from labs.models.configuration import GPTConfig
from labs.training_seconds import (
    LEAST,
    Batch,
    attention,
    backward,
    bandwidth,
    forward,
    linear,
    step,
    update,
)

GPT = GPTConfig(width=64, layers=1, heads=2, context=64, vocabulary=256)
BATCH = Batch(GPT, 4, 64, "bfloat16")
HERE = machine(
    packed_exp_s=1e-10, torch_product_64_bfloat16_1_flops=10e9, torch_product_64_float32_1_flops=20e9
)


def test_each_pass_of_a_step_is_its_products_its_attention_its_activations_and_its_calls():
    from labs.models.formulas import activation_bytes, parameters

    tokens, gpt = 4 * 64, BATCH.gpt
    hidden, vocabulary = gpt.size_of_hidden, gpt.vocabulary
    layers = [(64, 64)] * 4 + [(64, hidden), (hidden, 64), (64, vocabulary)]
    flops = sum(2.0 * tokens * inputs * outputs for inputs, outputs in layers)
    moved = sum(2 * (tokens * (inputs + outputs) + inputs * outputs) for inputs, outputs in layers)
    rate, kept = bandwidth(BATCH, HERE), activation_bytes(gpt, 4, 64)
    calls = 2 * (626 + 167) * HERE["torch_call_s"]
    for found, products, trips, exponentials, share in (
        (forward(BATCH, HERE), 1, 2, 2 * hidden + vocabulary, 0.4),
        (backward(BATCH, HERE), 2, 3, 3 * hidden + vocabulary, 0.6),
    ):
        assert found.products == pytest.approx(products * (flops / 10e9 + moved / rate))
        assert found.activations == pytest.approx(trips * kept / rate + tokens * exponentials * 1e-10)
        assert found.calls == pytest.approx(share * calls)
        parts = found.products, found.attention, found.activations, found.calls
        assert found.total == pytest.approx(sum(parts))
    assert update(BATCH, HERE) == pytest.approx(28 * parameters(gpt) / rate)
    both = forward(BATCH, HERE).total + backward(BATCH, HERE).total
    assert step(BATCH, HERE) == pytest.approx(both + update(BATCH, HERE))


@pytest.mark.parametrize(
    ("precision", "bias", "operators"),
    [
        ("bfloat16", False, 488 + 158),
        ("float32", True, 476 + 143),
        ("float32", False, 386 + 134),
    ],
)
def test_biases_and_conversions_are_operators_too(precision, bias, operators):
    batch = Batch(replace(GPT, bias=bias), 4, 64, precision)
    calls = forward(batch, HERE).calls + backward(batch, HERE).calls
    assert calls == pytest.approx(2 * operators * HERE["torch_call_s"])


def test_attention_multiplies_block_by_block_and_backward_adds_three_products_in_16_bits():
    """A block: 32 queries, 64 keys, 32 numbers a head; 16 blocks, 8 heads of 2 blocks."""
    blocks, flops, exponentials = 16, 2.0 * 32 * 64 * 32, 32 * 64 * 1e-10
    assert attention(BATCH, HERE, 0) == pytest.approx(blocks * (2 * flops / 20e9 + exponentials))
    assert attention(BATCH, HERE, 1) == pytest.approx(
        blocks * (2 * flops / 20e9 + 3 * LEAST / 10e9 + exponentials)
    )
    wide = replace(BATCH, precision="float32")
    alone = blocks * (5 * flops / 20e9 + exponentials)
    assert attention(wide, HERE, 1) == pytest.approx(alone)
    assert attention(replace(wide, threads=0), HERE, 1) == pytest.approx(alone / 2), "two cores"


def test_a_small_product_in_16_bits_takes_as_long_as_one_that_is_mostly_a_call():
    small = replace(BATCH, sequences=1, length=16)

    def moved(batch):
        return batch.size * (16 * (8 + 8) + 8 * 8) / bandwidth(batch, HERE)

    assert linear(small, HERE, 8, 8) == pytest.approx(LEAST / 10e9 + moved(small))
    wide = replace(small, precision="float32")
    assert linear(wide, HERE, 8, 8) == pytest.approx(2.0 * 16 * 8 * 8 / 20e9 + moved(wide))


@pytest.mark.parametrize(("jobs", "ranks", "sequences"), [(1, 1, 12), (2, 1, 12), (1, 2, 6)])
def test_what_is_touched_is_all_jobs_states_and_the_activations_with_their_gradients_on_all_ranks(
    jobs, ranks, sequences
):
    from labs.models.formulas import activation_bytes, parameters

    batch = replace(BATCH, sequences=sequences, jobs=jobs, ranks=ranks)
    touched = ranks * (jobs * 16 * parameters(GPT) + 2 * activation_bytes(GPT, sequences, 64))
    assert 8e6 < touched < 16e6, "where the machine's rate changes"
    assert bandwidth(batch, HERE) == pytest.approx(HERE.bandwidth(touched))
