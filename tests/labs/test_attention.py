"""The attention lab: its counts against the masks, every way against float64, its claims on stated times."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stated import Stated, machine

from labs import figure as figures
from labs.attention import LAB, claims, counts, decoding, inputs, model, proof, tiles, ways
from labs.lab import configure, find
from labs.machine import Curve
from labs.memory import extra_bytes

SMALL = configure(LAB, "quick", {"length": 96, "dim": 16, "window": 10, "sequences": 3, "block": 7})
HERE = machine(
    vector_lanes_float32=16.0,
    packed_exp_s=2.2e-9,  # 0.1 ns an instruction and element
    fma_latency_s=1e-9,
    torch_custom_call_s=10e-6,
    torch_product_16_float32_1_flops=40e9,
)


class Silent:
    """A recorder that keeps what is recorded."""

    def __init__(self):
        self.values = {}

    def record(self, name, value, unit):
        self.values[f"{name}_{unit}"] = value


@given(st.sampled_from(["full", "causal", "window"]), st.integers(1, 40), st.integers(1, 50))
def test_pairs_are_the_ones_of_the_mask(kind, length, window):
    mask = ways.mask_of(kind, length, window)
    expected = length**2 if mask is None else int(mask.sum())
    assert counts.pairs(kind, length, window) == expected


def test_flops_of_the_full_one_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    query, key, value = inputs.qkv(SMALL, 96, SMALL.heads)
    with FlopCounterMode(display=False) as counter:
        ways.naive(query, key, value)
    assert counts.work(SMALL, "full", 96, "fused").flops == counter.get_total_flops()


def test_pages_hold_the_cache_whatever_their_order():
    _, keys, _ = inputs.token(SMALL, 24)
    pages, table = inputs.paged(SMALL, keys)
    gathered = pages[table.long()].flatten(1, 2)[:, :24].transpose(1, 2)
    assert gathered.equal(keys)


def test_eight_bits_are_off_by_half_a_step_at_most():
    _, keys, _ = inputs.token(SMALL, 24)
    small, scale = inputs.quantized(keys)
    assert ((small * scale - keys).abs() <= 0.5001 * scale).all()
    assert small.abs().amax(-1).eq(127).all()  # no finer step would do


@pytest.mark.parametrize("address", [variant.address for variant in LAB.variants(SMALL)])
def test_every_way_computes_the_same_and_a_wrong_element_is_found(address):
    recorder = Silent()
    step = find(LAB, SMALL, address).setup(SMALL, recorder)
    output = step()
    (found,) = LAB.check(SMALL, {address: output})
    assert found.passed, found
    wrong = output.clone()
    wrong.view(-1)[-1] += 2 * found.tolerance + found.error
    assert not LAB.check(SMALL, {address: wrong})[0].passed
    assert not LAB.check(SMALL, {address: output * math.nan})[0].passed
    with pytest.raises(TypeError, match="no tensor of shape"):
        LAB.check(SMALL, {address: output[:1, :1]})
    if sys.platform == "linux":
        assert recorder.values["extra_memory_B"] >= 0


def test_the_int8_bound_is_not_idle():
    """It is above the error that is there and below the size of the result."""
    address = "token_96/cache_int8"
    (found,) = LAB.check(SMALL, {address: find(LAB, SMALL, address).setup(SMALL, Silent())()})
    assert found.tolerance / 1000 < found.error < found.tolerance < 1


def test_memory_of_the_naive_way_is_seen():
    import torch

    step = lambda: torch.ones(2**24).sum()  # noqa: E731
    grown = extra_bytes(step)
    if grown is None:
        pytest.skip("this system does not tell a process its highest resident size")
    assert 0.9 * 2**26 < grown < 1.5 * 2**26


# --- predictions, claims, figures ------------------------------------------------------------------


def predicted_results(**times):
    config = configure(LAB, "quick", {"length": 2048})
    columns = {}
    for mode in LAB.columns:
        found = {each.variant: each.value for each in LAB.predict(config, HERE.with_allocator(mode))}
        columns[mode] = found | {name.replace("__", "/"): seconds for name, seconds in times.items()}
    scores = 4.0 * config.heads * config.length**2
    values = {
        ("full_2048/naive", "extra_memory_B"): 2.0 * scores,
        ("full_2048/fused", "extra_memory_B"): 4.0 * config.heads * config.length * config.dim,
    }
    return Stated(config, HERE, columns, values=values)


def test_every_variant_is_predicted_with_its_numbers_and_a_suspect():
    found = {each.variant: each for each in LAB.predict(configure(LAB, "quick"), HERE)}
    assert set(found) == {each.address for each in LAB.variants(configure(LAB, "quick"))}
    for each in found.values():
        assert 0 < each.value < 100
        assert each.because
        assert each.suspect


# --- the pieces of a prediction: known numbers in, seconds out ---------------------------------------

RATE = 2 * 40e9  # FLOP/s of products, both cores
SLOT = 0.1e-9 / 2  # seconds of an instruction and element, both cores
ROW = 2 * 2 * 4 * 1e-9 / 2  # two reductions of 16 lanes, four halvings each
MEMORY, CACHE = 64e9, 80e9  # bytes/s of copies and of reads of what the caches hold


def computed_by_the_kernel(length, causal, window):
    """The loops of ``cpu_forward._forward`` around its three steps, in numbers."""
    from kernels.attention.cpu_forward import KEYS, QUERIES
    from kernels.attention.cpu_rows import first_key, group_keys, last_key
    from kernels.tiles import LANES, PANEL, ROWS

    found = dict(scores=0, values=0, weights=0, rows=0)
    for start in range(0, length, QUERIES):
        count = min(QUERIES, length - start)
        end = last_key(start + count - 1, length, causal, window)
        for tile in range(first_key(start, window) // PANEL * PANEL, end, KEYS):
            tile_end = min(tile + KEYS, end)
            for row in range(0, count, ROWS):
                first, last = group_keys(start, row, count, tile, tile_end, length, causal, window)
                if first >= last:
                    continue
                for panel in range(tile, tile_end, PANEL):
                    if first < panel + PANEL and last > panel:
                        found["scores"] += ROWS * -(-min(PANEL, last - panel) // LANES) * LANES
                found["values"] += ROWS * (last - first)
                vectors = -(-(last - tile) // LANES) - (first - tile) // LANES
                found["weights"] += min(ROWS, count - row) * vectors * LANES
                found["rows"] += min(ROWS, count - row)
    return found


@pytest.mark.parametrize(("causal", "window"), [(False, 0), (True, 0), (True, 10), (True, 128), (True, 400)])
@pytest.mark.parametrize("length", [1, 50, 96, 300, 600])
def test_tiles_of_ours_are_those_of_its_loops(length, causal, window):
    from kernels.tiles import LANES

    found = tiles.own(length, LANES, causal, window)
    expected = computed_by_the_kernel(length, causal, window)
    assert {name: getattr(found, name) for name in expected} == expected


def test_sizes_of_our_tiles_are_the_kernels():
    from kernels.attention import cpu_decode, cpu_forward
    from kernels.tiles import LANES, PANEL, ROWS

    assert (tiles.ROWS, tiles.panel(LANES)) == (ROWS, PANEL)
    assert (tiles.QUERIES, tiles.PANELS * PANEL) == (cpu_forward.QUERIES, cpu_forward.KEYS)
    assert (decoding.LEAST_CHUNKS, decoding.LEAST_KEYS) == (cpu_decode.LEAST_CHUNKS, cpu_decode.LEAST_KEYS)


def test_the_library_skips_whole_tiles_of_512_keys():
    short, long = tiles.library(512, 512, True), tiles.library(1024, 1024, True)
    assert short == tiles.Tiles(512**2, 512**2, 512**2, 512, 64 * 512), "nothing is skipped"
    assert long.scores == 2 * 256 * 512 + 2 * 256 * 1024
    assert (long.rows, long.tile) == (256 * (1 + 1 + 2 + 2), 256 * 512)
    assert tiles.library(1, 1024, False) == tiles.Tiles(1024, 1024, 1024, 2, 512)
    assert tiles.library(100, 700, False) == tiles.Tiles(70_000, 70_000, 70_000, 200, 32 * 512)


def stated(kind, name, length=96, config=SMALL, here=HERE):
    seconds, because = model.seconds(config, here, kind, length, name)
    assert because.count(" + ") >= 2, because
    return seconds


def test_our_full_one_by_hand():
    pairs = 8 * 96**2
    expected = pairs * (4 * 16 / RATE + 17 * SLOT) + 8 * 96 * ROW
    expected += 2 * (4 * 8 * 96 * 16) / MEMORY  # keys read and packed
    expected += 9e-6 + 2 * 2e-6 + 10e-6  # calls, two parallel regions, our operator
    assert stated("full", "fused") == pytest.approx(expected)


def test_ours_computes_a_masked_tile_but_for_what_six_queries_do_not_see():
    """16 queries: groups of 6, 6 and 4 see 6, 12 and 16 keys; one vector holds all; 6 rows are multiplied."""
    expected = 8 * (2 * 16 * 6 * (3 * 16 + 6 + 12 + 16) / RATE + 16 * 16 * 17 * SLOT + 16 * ROW)
    expected += 2 * (4 * 8 * 16 * 16) / MEMORY + 9e-6 + 2 * 2e-6 + 10e-6
    assert stated("causal", "fused", length=16) == pytest.approx(expected)
    assert stated("window", "fused", length=960) < stated("causal", "fused", length=960) / 2


def test_repeating_heads_reads_the_few_and_writes_the_many():
    copied = 4 * 96 * 16 * 2 * (2 + 8)
    assert stated("gqa", "repeated") - stated("full", "fused") == pytest.approx(
        copied / MEMORY + 10e-6 + 2 * 2e-6
    )
    packed = 2 * (4 * (8 - 2) * 96 * 16)
    assert stated("full", "fused") - stated("gqa", "fused") == pytest.approx(packed / MEMORY)


def test_the_librarys_by_hand_full_masked_and_causal():
    pairs = 8 * 96**2
    full = pairs * (4 * 16 / RATE + 25 * SLOT) + 8 * 96 * ROW + 6e-6 + 2e-6
    assert stated("full", "torch") == pytest.approx(full)
    assert stated("causal", "torch") == pytest.approx(full), "one tile of 512 keys"
    assert stated("causal", "torch", length=1024) < 0.8 * stated("full", "torch", length=1024)
    mask = (2 * 5 + 4) * 96**2 + 4 * 8 * 96**2
    assert stated("window", "torch") == pytest.approx(full + mask / MEMORY)


def test_the_naive_one_by_hand():
    pairs = 8 * 96**2
    computed = pairs * (4 * 16 / RATE + 25 * SLOT) + 8 * 96 * ROW
    assert stated("full", "naive") == pytest.approx(computed + 6 * 4 * pairs / MEMORY + 5e-6 + 5 * 2e-6)
    assert stated("causal", "naive") == pytest.approx(computed + 8 * 4 * pairs / MEMORY + 7e-6 + 7 * 2e-6)


def test_fresh_pages_of_the_scores_cost_only_where_malloc_gives_them_back():
    default, tuned = (
        stated("full", "naive", length=1024, here=HERE.with_allocator(mode)) for mode in ("default", "tuned")
    )
    assert default - tuned == pytest.approx(2 * 4 * 8 * 1024**2 * 0.5e-9)
    assert stated("full", "naive", 512) == stated("full", "naive", 512, here=HERE.with_allocator("tuned"))


def test_a_products_rate_is_that_of_one_tile_on_one_core():
    slow = machine(**HERE.constants | {"torch_product_1024_float32_1_flops": 400e9})
    assert stated("full", "torch", here=slow) < stated("full", "torch")
    rate = 2 * slow.product_rate(2 * 16 * 32 * 96)  # torch's tile of 96 queries: 32 with all 96 keys
    pairs = 8 * 96**2
    expected = pairs * (4 * 16 / rate + 25 * SLOT) + 8 * 96 * ROW + 6e-6 + 2e-6
    assert stated("full", "torch", here=slow) == pytest.approx(expected)


CACHED = 4 * 2 * 3 * 2 * 96 * 16  # bytes of keys and values: 3 sequences, 2 heads
TOKEN = 3 * 8 * 96  # pairs of a new token


def test_a_token_from_the_cache_by_hand():
    expected = TOKEN * (4 * 16 / RATE + 25 * SLOT) + 3 * 8 * ROW
    expected += 4 * CACHED / CACHE  # read by each of four query heads
    assert stated("token", "cache") == pytest.approx(expected + 8e-6 + 2e-6)


def test_a_cache_of_eight_bits_is_converted_and_scaled_first():
    numbers = CACHED / 4
    extra = numbers * (1 + 4 + 4 + 4) / MEMORY + 4e-6 + 4 * 2e-6
    assert stated("token", "cache_int8") - stated("token", "cache") == pytest.approx(extra)


def test_a_token_from_pages_by_hand():
    keys = 3 * 2 * 96
    expected = keys * 6 * 4 * 16 / RATE + TOKEN * 17 * SLOT
    expected += 4 * 6 * 2 * ROW  # four queries share a head; 96 keys are two tiles
    expected += keys * 16 * (4 + 2 + 4) * SLOT  # rows gathered; loads, stores, four steps of transposing
    expected += CACHED / CACHE + 9e-6 + 2e-6 + 10e-6
    assert stated("token", "pages") == pytest.approx(expected)
    # Eight times as many keys are twelve tiles, not sixteen, in three parts that four operations join.
    longer = 8 * (expected - 21e-6) - 4 * 6 * 4 * ROW + 25e-6
    assert stated("token", "pages", length=768) == pytest.approx(longer)


def test_pages_that_any_core_may_take_are_read_as_each_reads_all_of_them():
    apart = replace(HERE, curves=HERE.curves | {"read_all": Curve((1.0,), (200e9,))})
    assert stated("token", "pages", here=apart) == stated("token", "pages")
    saved = 4 * CACHED * (1 / CACHE - 1 / 200e9)
    assert stated("token", "cache") - stated("token", "cache", here=apart) == pytest.approx(saved)


def test_rows_of_pages_that_hold_whole_vectors_of_keys_need_not_be_gathered():
    whole = replace(SMALL, block=16)
    gathered = 3 * 2 * 96 * 16 * 4 * SLOT
    assert stated("token", "pages") - stated("token", "pages", config=whole) == pytest.approx(gathered)


def test_everything_again_is_ours_on_all_sequences():
    again = stated("token", "recompute")
    alone = stated("causal", "fused")
    calls = 9e-6 + 2 * 2e-6 + 10e-6
    keys = 2 * (4 * 96 * 16) / MEMORY  # of one head
    assert again - calls == pytest.approx(3 * (alone - calls) - 3 * (8 - 2) * keys)


def test_heads_that_cannot_be_shared_by_four_are_refused():
    with pytest.raises(ValueError, match="heads=6 is not a multiple of 4"):
        configure(LAB, "quick", {"heads": 6})


def test_all_claims_hold_when_the_predictions_come_true():
    results = predicted_results()
    verdicts = {claim.text: claim.holds(results) for claim in LAB.claims}
    assert all(verdict is True for verdict in verdicts.values()), verdicts


@pytest.mark.parametrize(
    ("claim", "times"),
    [
        (claims.fused_is_faster, {"full_2048__naive": 1e-9}),
        (claims.causal_skips_half, {"causal_2048__fused": 1.0}),
        (claims.window_is_linear, {"window_2048__fused": 1.0}),
        (claims.sharing_saves_the_copy, {"gqa_2048__fused": 1.0}),
        (claims.cache_saves_everything, {"token_2048__cache": 1.0}),
        (claims.pages_cost_little, {"token_2048__pages": 1.0}),
    ],
)
def test_each_claim_can_fail(claim, times):
    assert claim(predicted_results(**times)) is False


def test_the_memory_claim_can_fail():
    results = predicted_results()
    greedy = replace(results, values=dict.fromkeys(results.values, 1e12))
    assert claims.fused_saves_memory(greedy) is False


@pytest.mark.parametrize("claim", LAB.claims, ids=lambda claim: claim.text[:30])
def test_nothing_measured_decides_nothing(claim):
    assert claim.holds(Stated(configure(LAB, "quick"), HERE, {})) is None


def test_figures_carry_their_numbers_and_survive_json():
    drawn = LAB.figure(predicted_results())
    assert len(drawn) == 3
    for each in drawn:
        assert figures.to_json(figures.from_json(figures.to_json(each))) == figures.to_json(each)


def test_importing_the_lab_loads_no_heavy_package():
    code = (
        "import sys; from labs import load; from labs.lab import configure; lab = load('attention');"
        "config = configure(lab, 'quick'); lab.variants(config); lab.memory_bytes(config);"
        "print([name for name in ('torch', 'numpy', 'numba', 'jax') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_reference_is_causal_where_it_should_be():
    """The last query of a causal reference is the full one's; the first sees one key only."""
    causal, full = (proof._reference(SMALL, kind, 24) for kind in ("causal", "full"))
    assert causal[:, :, -1].allclose(full[:, :, -1])
    assert causal[:, :, 0].allclose(inputs.qkv(SMALL, 24, SMALL.heads)[2].double()[:, :, 0])
