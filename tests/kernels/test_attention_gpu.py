"""Attention's Triton kernels: in the interpreter against float64, and what the compiler makes of them.

Most tests run in the child process of test_interpreter.py, since a process either interprets or compiles.
"""

import itertools
import math

import pytest
import torch

from kernels.attention import reference
from kernels.interpreter import interpreting, repair

pytest.importorskip("triton")

from kernels.attention import gpu_backward, gpu_decode, gpu_forward, gpu_tiles
from kernels.attention.gpu_tiles import Tile

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
in_a_compiling_process = pytest.mark.skipif(interpreting(), reason="TRITON_INTERPRET=1: nothing compiles")


def in_the_interpreter(test):
    here = pytest.mark.skipif(not interpreting(), reason="runs in the child of test_interpreter.py")
    return pytest.mark.interpreted(here(test))


HOST = Tile(64, 64, 4, 2, "host")
POINTERS = Tile(32, 64, 4, 2)
DEVICE = Tile(64, 32, 4, 2, "device", specialized=True)


# --- against float64 -----------------------------------------------------------------------------


def random(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tensors(batch, heads, key_heads, length, keys, dim, dtype):
    queries, others = (batch, heads, length, dim), (batch, key_heads, keys, dim)
    shapes = (queries, others, others, queries)
    return [random(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


def expected(query, key, value, grad, mask, causal, scale, window, dtype):
    """(output, gradients) by the reference in this dtype."""
    inputs = [tensor.to(dtype).requires_grad_() for tensor in (query, key, value)]
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    output = reference.scaled_dot_product_attention(*inputs, mask, causal, scale, True, window or None)
    return output.detach(), *torch.autograd.grad(output, inputs, grad.to(dtype))


def check(query, key, value, grad, *, mask=None, causal=False, scale=None, window=0, tile=None, tiles=None):
    """At most twice the error of plain torch in the same dtype; (output, log_sum_exp, gradients).

    Besides that some roundings of float32 of the largest value: where plain torch subtracts equal numbers
    (a query that sees one key), flash attention's delta comes from the output and differs in its last bits.
    """
    repair()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    numbers = (0.0, 0, causal, scale, window)
    output, log_sum_exp = gpu_forward.attention(query, key, value, mask, *numbers, tile=tile)
    gradients = gpu_backward.attention_backward(
        grad, query, key, value, mask, output, log_sum_exp, *numbers, tiles=tiles
    )
    arguments = (query, key, value, grad, mask, causal, scale, window)
    exact, plain = expected(*arguments, torch.float64), expected(*arguments, query.dtype)
    size = max(truth.abs().max() for truth in exact)
    for name, ours, theirs, truth in zip(
        ("output", "query", "key", "value"), (output, *gradients), plain, exact, strict=True
    ):
        allowed = 2 * (theirs.double() - truth).abs().max() + 4 * torch.finfo(torch.float32).eps * size
        error = (ours.double() - truth).abs().max()
        assert error <= allowed, f"{name}: {error:.2e}, allowed {allowed:.2e}"
    return output, log_sum_exp, gradients


@in_the_interpreter
@pytest.mark.parametrize("dtype", FLOATS)
def test_shared_heads_and_a_head_dimension_that_is_no_power_of_two(dtype):
    check(*tensors(1, 2, 1, 70, 70, 80, dtype), causal=True, tile=HOST, tiles=(HOST, HOST))


@in_the_interpreter
@pytest.mark.parametrize("dtype", FLOATS)
def test_pointers(dtype):
    check(*tensors(2, 1, 1, 37, 128, 16, dtype), tile=POINTERS, tiles=(POINTERS, POINTERS))


@in_the_interpreter
@pytest.mark.parametrize(
    ("length", "keys", "causal", "window"),
    [
        (1, 130, False, 0),
        (130, 37, True, 0),
        (37, 130, True, 0),
        (130, 130, True, 33),
        (190, 64, True, 40),
        (70, 70, True, 1),
    ],
)
def test_lengths_and_windows(length, keys, causal, window):
    chosen = tensors(1, 1, 1, length, keys, 16, torch.float32)
    check(*chosen, causal=causal, window=window, tile=HOST, tiles=(HOST, HOST))


@in_the_interpreter
@pytest.mark.parametrize(("causal", "window"), [(False, 0), (True, 50)])
def test_roles_of_their_own_compute_the_same(causal, window):
    chosen = tensors(1, 2, 1, 128, 96, 16, torch.float32)
    check(*chosen, causal=causal, window=window, tile=DEVICE, tiles=(POINTERS, HOST))


@in_the_interpreter
def test_the_tile_that_is_used_and_a_negative_scale():
    check(*tensors(1, 1, 1, 130, 130, 128, torch.bfloat16), causal=True)
    check(*tensors(1, 1, 1, 40, 40, 16, torch.float32), causal=True, scale=-0.3)


@in_the_interpreter
def test_masks_and_queries_that_see_nothing():
    chosen = tensors(1, 2, 2, 37, 70, 16, torch.float32)
    seen = torch.rand(1, 2, 37, 70, generator=torch.Generator().manual_seed(9)) > 0.4
    seen[:, 1, 5] = False
    added = random(1, 1, 37, 70, seed=10)
    added[..., 7, :] = -math.inf
    for mask, hidden in (
        (seen, (0, 1, 5)),
        (added, (0, 0, 7)),
        (added.expand(1, 2, 37, 70), (0, 1, 7)),
        (seen[:, :1, :1], None),
        (added[..., :1], None),
    ):
        output, log_sum_exp, gradients = check(*chosen, mask=mask, tile=HOST, tiles=(HOST, POINTERS))
        if hidden:
            assert (output[hidden] == 0).all()
            assert log_sum_exp[hidden] == -math.inf
            assert (gradients[0][hidden] == 0).all()


@in_the_interpreter
def test_log_sum_exp_is_the_natural_one():
    query, key, value, _ = tensors(1, 1, 1, 20, 30, 16, torch.float32)
    _, log_sum_exp = gpu_forward.attention(query, key, value, None, 0.0, 0, False, 0.5, 0)
    torch.testing.assert_close(log_sum_exp, (0.5 * query @ key.transpose(-2, -1)).logsumexp(-1))


@in_the_interpreter
def test_strides_and_empty_tensors():
    chosen = [
        tensor.transpose(1, 2).contiguous().transpose(1, 2)
        for tensor in tensors(1, 2, 2, 37, 37, 16, torch.float32)
    ]
    check(*chosen, causal=True, tile=HOST, tiles=(HOST, POINTERS))
    odd = [tensor[..., 1:] for tensor in chosen]  # starts at no multiple of 16 bytes
    check(*odd, causal=True)
    query, key = torch.ones(1, 2, 3, 16), torch.ones(1, 2, 0, 16)
    output, log_sum_exp = gpu_forward.attention(query, key, key, None, 0.0, 0, False, 1.0, 0)
    assert (output == 0).all()
    assert (log_sum_exp == -math.inf).all()


# --- dropout -------------------------------------------------------------------------------------


@in_the_interpreter
def test_every_kernel_drops_the_same_weights():
    """By the weights themselves: value is the identity, so that the output is the weights."""
    length = 64
    query, key, _, grad = tensors(1, 2, 1, length, length, length, torch.float32)
    value = torch.eye(length)[None, None]
    numbers = (0.4, 1234567890123, True, 0.2, 0)
    output, log_sum_exp = gpu_forward.attention(query, key, value, None, *numbers, tile=DEVICE)
    weights = (0.2 * query @ key.transpose(-2, -1)).masked_fill(~torch.ones(64, 64).tril().bool(), -math.inf)
    weights = weights.softmax(-1)
    keep = output != 0
    share = keep[weights > 1e-6].float().mean()
    assert 0.57 < share < 0.63  # 0.6 of about 4,000: four standard deviations
    assert not torch.equal(keep[:, 0], keep[:, 1])
    torch.testing.assert_close(output, torch.where(keep, weights / 0.6, 0.0))

    inputs = [tensor.double().requires_grad_() for tensor in (query, key, value)]
    scores = (0.2 * inputs[0] @ inputs[1].transpose(-2, -1)).masked_fill(
        ~torch.ones(64, 64).tril().bool(), -math.inf
    )
    exact = torch.where(keep, scores.softmax(-1) / 0.6, 0.0) @ inputs[2]
    truth = torch.autograd.grad(exact, inputs, grad.double())
    gradients = gpu_backward.attention_backward(
        grad, query, key, value, None, output, log_sum_exp, *numbers, tiles=(POINTERS, HOST)
    )
    for ours, right in zip(gradients, truth, strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=1e-5)

    again, _ = gpu_forward.attention(query, key, value, None, *numbers, tile=HOST)
    assert torch.equal(again != 0, keep)
    other, _ = gpu_forward.attention(query, key, value, None, 0.4, 5, *numbers[2:], tile=HOST)
    assert not torch.equal(other != 0, keep)


# --- decode --------------------------------------------------------------------------------------


@in_the_interpreter
@pytest.mark.parametrize("dtype", FLOATS)
def test_decode(dtype, monkeypatch):
    repair()
    monkeypatch.setattr(
        gpu_decode, "split_sizes", lambda *sizes: (3, 64)
    )  # the second and the third have parts
    query = random(3, 4, 80, seed=0, dtype=dtype)
    caches = [random(20, 16, 2, 80, seed=seed, dtype=dtype) for seed in (1, 2)]
    table = torch.randint(0, 20, (3, 11), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    table[1, 4:] = -7  # beyond its context: anything
    lengths = torch.tensor([170, 60, 0], dtype=torch.int32)
    output = gpu_decode.decode_attention(query, *caches, table, lengths, 0.3)
    exact = reference.decode_attention(query.double(), *(c.double() for c in caches), table, lengths, 0.3)
    plain = reference.decode_attention(query, *caches, table, lengths, 0.3)
    allowed = 2 * (plain.double() - exact).abs().max() + 1e-6
    assert (output.double() - exact).abs().max() <= allowed
    assert (output[2] == 0).all()


@in_the_interpreter
def test_a_wrong_table_reads_nothing_outside_the_cache():
    query, cache = torch.ones(1, 1, 16), torch.full((2, 16, 1, 16), 3.0)
    for block in (2, -1, 2**31 - 1):
        table = torch.tensor([[0, block]], dtype=torch.int32)
        lengths = torch.tensor([1000], dtype=torch.int32)  # longer than the table, too
        output = gpu_decode.decode_attention(query, cache, cache, table, lengths, 1.0)
        torch.testing.assert_close(output, torch.full_like(output, 3.0))


def test_splits_cover_every_context():
    for sequences, key_heads, keys, target in itertools.product(
        (1, 7, 300), (1, 8), (1, 64, 100, 4097, 2**20), gpu_tiles.MULTIPROCESSORS
    ):
        parts, length = gpu_decode.split_sizes(sequences, key_heads, keys, 64, target)
        assert length % 64 == 0
        assert (parts - 1) * length < keys <= parts * length
        assert 1 <= parts <= gpu_decode.LARGEST_SPLIT


# --- tiles ---------------------------------------------------------------------------------------


def test_every_size_has_a_tile():
    directions = ("forward", "backward keys", "backward queries", "decode")
    for target, dim, dtype, direction, light, grouped in itertools.product(
        gpu_tiles.MULTIPROCESSORS,
        (1, 16, 65, 128, 129, 256),
        FLOATS,
        directions,
        (False, True),
        (False, True),
    ):
        tile = gpu_tiles.configuration(dim, dtype, direction, target, light, grouped)
        assert tile.rows <= gpu_backward.LARGEST_TILE
        assert not tile.descriptors or target in ("sm_90", "sm_100")
        assert tile.precision == ("tf32x3" if dtype == torch.float32 and target != "gfx942" else "ieee")


def test_tensors_that_the_copy_engine_cannot_fetch_go_by_pointers():
    good = torch.empty(2, 3, 5, 64, dtype=torch.bfloat16)
    assert gpu_tiles.tile_for("forward", False, good, good, good).descriptors == "host"
    shared = gpu_tiles.tile_for("backward keys", False, good, good[:, :1], good[:, :1])
    assert shared == gpu_tiles.configuration(64, torch.bfloat16, "backward keys", "sm_90", grouped=True)
    assert shared != gpu_tiles.tile_for("backward keys", False, good, good, good)
    for bad in (good[..., 1:], good[:1].expand(2, 3, 5, 64), torch.empty(2, 3, 5, 63, dtype=torch.bfloat16)):
        assert gpu_tiles.tile_for("forward", False, bad, bad, bad).descriptors == ""
    one = torch.empty(1, 1, 5, 64).as_strided((1, 1, 5, 64), (3, 3, 64, 1))  # strides of single elements
    assert gpu_tiles.tile_for("backward keys", True, one.bfloat16()).descriptors == "host"
    assert gpu_tiles.describe(one, 32).strides == [64, 64, 64, 1]


@in_a_compiling_process
@pytest.mark.timeout(300)
def test_on_hopper_no_spills_matrix_instructions_and_the_copy_engine(compiling_alone):
    from kernels.ahead_of_time import compile_for
    from kernels.attention.gpu_shipped import compilation

    roles = [tile for tile in gpu_tiles.candidates(128, "forward", "sm_90") if tile.specialized]
    used = [
        (kernel, gpu_tiles.configuration(128, torch.bfloat16, kernel, "sm_90"))
        for kernel in ("forward", "backward keys", "backward queries")
    ]
    for kernel, tile in (*used, ("forward", roles[0])):
        code = compile_for(compilation(kernel, 128, tile, ("sm_90",)), "sm_90")
        assert code.problems == (), code.summary
        assert code.spill_bytes == 0
        assert code.matrix_kinds == ("HGMMA",)
        assert code.tma > 0
        assert code.specialized == tile.specialized
