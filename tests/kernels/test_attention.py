"""What is special about attention: masks that hide everything, dropout, dimensions, paged tables, SIMD."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kernels import FallbackWarning, decode_attention, scaled_dot_product_attention
from kernels.attention import cpu_rows, reference
from kernels.compiled_once import address, keep_alive
from kernels.inspect import inspect_function
from kernels.simd import vector_bits
from kernels.threads import chunked
from kernels.tiles import LANES, PANEL, ROWS, VECTORS, multiply, pack_transposed


@pytest.fixture(autouse=True)
def kernels_alone(every_size, monkeypatch):
    monkeypatch.setattr("kernels.op._warned", set())


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- tiles ---------------------------------------------------------------------------------------


@chunked
def product(chunk, c, a, b, depth, vectors, fresh):
    packed = np.empty((b.shape[0] // PANEL, depth, PANEL), np.float32)
    for panel in range(len(packed)):
        pack_transposed(
            address(packed, panel * depth * PANEL), address(b, panel * PANEL * depth), PANEL, depth
        )
    multiply(
        address(c, 0),
        c.shape[1],
        address(a, 0),
        depth,
        1,
        address(packed, 0),
        PANEL,
        depth * PANEL,
        depth,
        vectors,
        fresh,
    )
    keep_alive(packed)


@pytest.mark.parametrize("depth", [1, 63, 130])
def test_a_tile_is_a_product_and_touches_nothing_else(depth):
    for vectors in (1, 2, 3, 4, 5, 9):
        columns = -(-vectors * LANES // PANEL) * PANEL
        a, b = random(ROWS, depth), random(columns, depth, seed=1)
        for fresh in (True, False):
            c = torch.full((ROWS, columns), 3.0)
            product(1, c, a, b, depth, vectors, fresh)
            expected = a.double() @ b.double().T + (0 if fresh else 3)
            used = vectors * LANES
            torch.testing.assert_close(c[:, :used].double(), expected[:, :used], rtol=1e-7, atol=3e-5)
            assert (c[:, used:] == 3).all()


@chunked
def exponentials(chunk, x, out):
    for i in range(len(x)):
        out[i] = cpu_rows.exponential(x[i])


def test_the_exponential_keeps_its_bounds():
    x = np.concatenate([np.linspace(-87.6, 80, 100_001), [0, -88, -1e30, -np.inf]]).astype(np.float32)
    out = np.empty_like(x)
    exponentials(1, torch.from_numpy(x), torch.from_numpy(out))
    exact = np.exp(x[:-4].astype(np.float64))
    error = np.abs(out[:-4] / exact - 1)
    assert error.max() < 4e-7
    assert error[np.abs(x[:-4]) < 20].max() < 1.5e-7
    assert out[-4] == 1
    assert (out[-3:] == 0).all()
    nan = torch.tensor([math.nan])
    exponentials(1, nan, nan)
    assert nan.isnan().all()


@pytest.mark.skipif(vector_bits() < 512, reason="this CPU has no AVX-512: vectors are narrower")
@pytest.mark.parametrize(
    "kernel", [multiply, cpu_rows.online_softmax, cpu_rows.slopes_of], ids=lambda kernel: kernel.__name__
)
def test_the_kernels_are_full_width(kernel):
    found = inspect_function(kernel.compiled, kernel.kinds)
    assert not found.libm
    assert not found.float64
    widest = max(found.loops, key=lambda loop: loop.packed)
    assert widest.packed_bits == 512
    if kernel is multiply:  # a product for each cell of the tile; how often LLVM unrolls depends on the CPU
        assert widest.packed >= ROWS * VECTORS
        assert widest.packed % (ROWS * VECTORS) == 0
        assert widest.scalar == 0
        assert found.scalar_fma == 0
    else:
        assert widest.packed >= 12


# --- scaled_dot_product_attention ----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bool", "added", "window"])
def test_queries_that_see_nothing_give_zeros_also_in_gradients(kind):
    query, key, value = (
        random(1, 2, length, 16, seed=seed).requires_grad_() for seed, length in enumerate((90, 70, 70))
    )
    blind = torch.zeros(90, dtype=torch.bool)
    if kind == "window":
        blind[70 + 4 :] = True
        out = scaled_dot_product_attention(query, key, value, window=5)
    else:
        blind[[0, 7, 89]] = True
        seen = ~blind[:, None].expand(90, 70)
        mask = seen if kind == "bool" else torch.zeros(90, 70).masked_fill(~seen, -math.inf)
        out = scaled_dot_product_attention(query, key, value, mask)
    gradients = torch.autograd.grad(out, (query, key, value), random(*out.shape, seed=9))
    assert (out[:, :, blind] == 0).all()
    assert (gradients[0][:, :, blind] == 0).all()
    assert (out[:, :, ~blind] != 0).any(-1).all()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_nan_and_infinity_come_through():
    query, key, value = (random(1, 1, 20, 16, seed=seed) for seed in range(3))
    query[0, 0, 3, 2] = math.nan
    value[0, 0, 5, 1] = math.inf
    out = scaled_dot_product_attention(query, key, value)
    assert out[0, 0, 3].isnan().all()
    assert (out[0, 0, [0, 1, 2, 4], 1] == math.inf).all()
    assert out[0, 0, 4:, 2:].isfinite().all()


@pytest.mark.parametrize("shape", [(9, 16), (3, 9, 16), (2, 3, 2, 9, 16)])
@pytest.mark.parametrize("mask", [None, (9, 9), (9, 1), (1, 9)])
def test_any_number_of_dimensions(shape, mask):
    query, key, value = (random(*shape, seed=seed) for seed in range(3))
    mask = None if mask is None else random(*mask, seed=5)
    torch.testing.assert_close(
        scaled_dot_product_attention(query, key, value, mask),
        F.scaled_dot_product_attention(query, key, value, mask),
    )


def test_a_mask_for_each_of_five_dimensions():
    query, key, value = (random(2, 3, 2, 9, 16, seed=seed) for seed in range(3))
    mask = random(3, 1, 9, 9, seed=5) > 0
    mask[..., 0] = True
    torch.testing.assert_close(
        scaled_dot_product_attention(query, key, value, mask),
        F.scaled_dot_product_attention(query, key, value, mask),
    )


def test_dropout_drops_its_share_and_backward_drops_the_same(device):
    length = dim = 64  # the values are the identity: the output is the weights
    query, key = (random(2, 4, length, dim, seed=seed).to(device).requires_grad_() for seed in range(2))
    value = torch.eye(dim, device=device).expand(2, 4, dim, dim).contiguous().requires_grad_()
    torch.manual_seed(3)
    out = scaled_dot_product_attention(query, key, value, dropout_p=0.3)
    kept = out.detach() != 0
    assert abs(kept.double().mean().item() - 0.7) < 0.01
    assert kept.double().mean(-1).std() < 0.08  # no row is favoured
    torch.manual_seed(3)
    assert torch.equal(out, scaled_dot_product_attention(query, key, value, dropout_p=0.3))
    assert not torch.equal(out, scaled_dot_product_attention(query, key, value, dropout_p=0.3))

    exact = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    weights = (exact[0] @ exact[1].transpose(-2, -1) / math.sqrt(dim)).softmax(-1) * kept / 0.7
    expected = weights @ exact[2]
    grad = random(*out.shape, seed=8).to(device)
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-5)
    for got, want in zip(
        torch.autograd.grad(out, (query, key, value), grad),
        torch.autograd.grad(expected, exact, grad.double()),
        strict=True,
    ):
        torch.testing.assert_close(got.double(), want, atol=3e-6, rtol=1e-5)


def test_dropout_compiles_and_a_window_too():
    query = random(1, 2, 40, 16)
    compiled = torch.compile(scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    assert compiled(query, query, query, dropout_p=0.5).shape == query.shape
    torch.testing.assert_close(
        compiled(query, query, query, window=3), scaled_dot_product_attention(query, query, query, window=3)
    )


@pytest.mark.parametrize("window", [0, -1, 2.0, True])
def test_a_window_is_a_number_of_keys(window):
    query = random(1, 1, 4, 8)
    with pytest.raises(ValueError, match="window="):
        scaled_dot_product_attention(query, query, query, window=window)


def test_errors_are_torchs():
    query = random(1, 1, 4, 8)
    for arguments in (
        {"attn_mask": torch.ones(5, 4, dtype=torch.bool)},
        {"key": random(1, 1, 4, 9)},
        {"key": query.half()},
        {"dropout_p": 1.5},
    ):
        both = []
        for function in (F.scaled_dot_product_attention, scaled_dot_product_attention):
            with pytest.raises((RuntimeError, ValueError)) as caught:
                function(**{"query": query, "key": query, "value": query, **arguments})
            both.append((caught.type, str(caught.value)))
        assert both[0] == both[1]
    with pytest.raises(ValueError, match="4 keys but 5 values"):  # torch computes something
        scaled_dot_product_attention(query, query, random(1, 1, 5, 8))


@pytest.mark.parametrize("case", ["double", "value", "wide", "mask", "broadcast"])
def test_what_the_kernels_do_not_take_runs_torchs_own_and_says_so(case):
    query, key, value = (random(1, 2, 9, 300 if case == "wide" else 16, seed=seed) for seed in range(3))
    mask = None
    if case == "double":
        query, key, value = query.double(), key.double(), value.double()
    elif case == "value":
        value = value[..., :8]
    elif case == "mask":
        mask = random(9, 9).requires_grad_()
    elif case == "broadcast":
        query = query.expand(3, 2, 9, 16)
    with pytest.warns(FallbackWarning, match="scaled_dot_product_attention"):
        out = scaled_dot_product_attention(query, key, value, mask, window=4)
    seen = reference.band(9, 9, True, 4)
    mask = seen if mask is None else torch.where(seen, mask, -math.inf)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(query, key, value, mask))


# --- decode_attention ----------------------------------------------------------------------------


def paged(lengths=(20, 0, 33), heads=4, kv_heads=2, dim=8, block_size=4, most=9, blocks=30):
    query = random(len(lengths), heads, dim)
    keys, values = (random(blocks, block_size, kv_heads, dim, seed=seed) for seed in (1, 2))
    table = torch.full((len(lengths), most), -7, dtype=torch.int32)
    for sequence, length in enumerate(lengths):
        used = -(-length // block_size)
        table[sequence, :used] = torch.arange(used, dtype=torch.int32) * 3 + sequence
    return [query, keys, values, table, torch.tensor(lengths, dtype=torch.int32)]


def test_blocks_beyond_the_context_are_not_looked_at_and_no_keys_give_zeros(device):
    arguments = [tensor.to(device) for tensor in paged()]
    out = decode_attention(*arguments)
    torch.testing.assert_close(out, reference.decode_attention(*arguments))
    assert (out[1] == 0).all()


def test_a_long_context_is_cut_into_parts(device):
    arguments = paged((2000, 513), heads=2, kv_heads=1, block_size=100, most=20)
    arguments[3] = torch.arange(40, dtype=torch.int32).view(2, 20) % 30
    arguments = [tensor.to(device) for tensor in arguments]
    torch.testing.assert_close(decode_attention(*arguments), reference.decode_attention(*arguments))


@pytest.mark.parametrize("block_size", [16, 20, 64, 80, 192])
@pytest.mark.parametrize("dim", [16, 40, 64])
def test_pages_are_read_up_to_the_last_key_only(dim, block_size):
    """What is behind the last key, in its page and in blocks of nobody, is not a number."""
    query, keys, values, table, lengths = paged((1, 100, 383), 8, 2, dim, block_size, 24, blocks=72)
    exact = reference.decode_attention(query, keys, values, table, lengths)
    seen = torch.zeros(len(keys), block_size, dtype=torch.bool)
    for row, length in zip(table, lengths, strict=True):
        place = torch.arange(int(length))
        seen[row[place // block_size].long(), place % block_size] = True
    keys[~seen] = values[~seen] = math.nan
    torch.testing.assert_close(decode_attention(query, keys, values, table, lengths), exact)


@pytest.mark.parametrize(
    ("place", "change", "error", "message"),
    [
        (0, lambda query: query[0], ValueError, "query is"),
        (0, lambda query: query[:, :3], ValueError, "kv_heads divide"),
        (0, lambda query: query[..., :7], ValueError, "dim must agree"),
        (0, lambda query: query.half(), TypeError, "one dtype"),
        (2, lambda values: values[1:], ValueError, "both caches"),
        (3, lambda table: table[1:], ValueError, "block_table is"),
        (3, lambda table: table.long(), TypeError, "int32"),
        (3, lambda table: table[:, :8], ValueError, r"context_lengths\[2\] is 33"),
        (3, lambda table: table.clamp(max=25), None, ""),
        (3, lambda table: table + 5, ValueError, r"block_table\[2\].*between 0 and 29"),
        (3, lambda table: table - 1, ValueError, r"block_table\[0\].*between 0 and 29"),
        (4, lambda lengths: -lengths, ValueError, r"context_lengths\[0\] is -20"),
    ],
)
def test_bad_tables_are_refused(place, change, error, message):
    arguments = paged()
    arguments[place] = change(arguments[place])
    if error is None:
        decode_attention(*arguments)
        return
    with pytest.raises(error, match=message):
        decode_attention(*arguments)


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float64, 8), (torch.float32, 257)])
def test_decode_that_the_kernels_do_not_take_runs_torch_says_so_and_refuses_bad_tables(dtype, dim):
    query, keys, values, table, lengths = paged(dim=dim)
    floats = [tensor.to(dtype) for tensor in (query, keys, values)]
    with pytest.warns(FallbackWarning, match=r"decode_attention: .*(not float64|not 257)"):
        out = decode_attention(*floats, table, lengths)
    torch.testing.assert_close(out, reference.decode_attention(*floats, table, lengths))
    with pytest.raises(ValueError, match=r"block_table\[2\].*between 0 and 29"):
        decode_attention(*floats, table + 5, lengths)
    with pytest.raises(ValueError, match=r"context_lengths\[2\] is 33"):
        decode_attention(*floats, table[:, :8], lengths)
