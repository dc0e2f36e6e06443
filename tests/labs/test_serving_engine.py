"""The serving engine: the same tokens under every policy, and not a block too many or too few."""

import ast
import dataclasses
import inspect
import time
from contextlib import suppress
from functools import cache
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_model import SMALL, engine, model, plain, requests, run_all, written_without_a_cache
from serving_workers import Witness

from labs.serving.blocks import BlockPool
from labs.serving.engine import Engine, shape_of
from labs.serving.layout import Layout
from labs.serving.paged import PagedGPT
from labs.serving.policies import LEAST_CHUNK, Running, Work, chunked, prefill_first
from labs.serving.request import HandOver, Request
from labs.serving.simulator import Nothing
from labs.serving.worker import Add, Model, Receive, Reset, Stop, Worker, _Packing

REQUESTS = requests(8)
pytestmark = pytest.mark.filterwarnings("ignore:kernels.decode_attention")  # float64 runs torch's own


@pytest.fixture(autouse=True)
def one_thread():
    """The model is so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def expected():
    return {each.number: written_without_a_cache(each) for each in REQUESTS}


def tokens_of(events):
    assert all([event.place for event in row] == list(range(len(row))) for row in events.values())
    assert all([event.finished for event in row[:-1]] == [""] * (len(row) - 1) for row in events.values())
    return {number: [event.token for event in row] for number, row in events.items()}


# --- the same tokens ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "budget"), [("prefill_first", 64), ("prefill_first", 1), ("chunked", 7), ("chunked", 1000)]
)
def test_every_policy_writes_what_a_forward_without_a_cache_does(policy, budget):
    one = engine(policy, budget=budget)
    for each in REQUESTS:
        one.add(each, 0.0)
    assert tokens_of(run_all([one])) == expected()
    assert one.pool.held == 0
    assert one.hits > 0  # half of the prompts begin alike


def test_disaggregated_workers_write_the_same():
    first, last = engine("disaggregated", "prefill"), engine("disaggregated", "decode")
    for each in REQUESTS:
        first.add(each, 0.0)
    assert tokens_of(run_all([first, last])) == expected()
    assert first.pool.held == last.pool.held == 0


def test_a_wrong_key_changes_the_tokens():
    """The model's tokens depend on what is cached: on other keys it writes others."""
    one = engine("chunked", budget=16)
    for each in REQUESTS:
        one.add(each, 0.0)
    store = one.executor.run

    def spoil(works):
        found = store(works)
        one.executor.cache[:, 0, 0, 0] += 1.0
        return found

    one.executor.run = spoil
    assert tokens_of(run_all([one])) != expected()


def test_requests_that_come_while_others_are_served_write_the_same():
    one, found = engine("chunked", budget=9), {}
    waiting = list(REQUESTS)
    while waiting or not one.idle:
        if waiting:
            one.add(waiting.pop(0), 0.0)
        for event in one.step().events:
            found.setdefault(event.number, []).append(event)
    assert tokens_of(found) == expected()


def test_a_retried_request_goes_on_as_if_nothing_had_happened():
    """With noise too: it depends on the place of a token, not on who draws it."""
    for temperature in (0.0, 0.7):
        request = Request(3, (5, 6, 7), 8, temperature=temperature, seed=11)
        whole, again = engine("chunked"), engine("prefill_first")
        whole.add(request, 0.0)
        tokens = tokens_of(run_all([whole]))[3]
        assert len(tokens) == 8
        again.add(request.after(tokens[:5]), 0.0)
        rest = run_all([again])[3]
        assert [event.place for event in rest] == [5, 6, 7]
        assert [event.token for event in rest] == tokens[5:]


def test_temperature_draws_from_the_softmax():
    """10 000 seeds: shares of the tokens within 4 standard deviations of their probabilities."""
    from labs.serving.paged import _choose

    logits = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64)
    runnings = [
        Running(Request(n, (1,), 1, temperature=2.0, seed=n), 0.0, [1], blocks=[]) for n in range(10_000)
    ]
    works = [Work(each, 0, 1) for each in runnings]
    drawn = torch.tensor(_choose(logits.repeat(len(works), 1), works))
    wanted = (logits / 2).softmax(-1)
    shares = torch.bincount(drawn, minlength=4) / len(works)
    assert ((shares - wanted).abs() < 4 * (wanted * (1 - wanted) / len(works)).sqrt()).all()


def test_a_stop_token_ends_a_request_early():
    tokens = expected()[0]
    at = next(i for i, token in enumerate(tokens) if token not in tokens[:i] and i >= len(tokens) // 2)
    one = engine("chunked")
    one.add(dataclasses.replace(REQUESTS[0], stop=frozenset({tokens[at]})), 0.0)
    found = run_all([one])[0]
    assert [event.token for event in found] == tokens[: at + 1]
    assert found[-1].finished == "stop"
    assert one.pool.held == 0


def test_grouped_heads_and_learned_positions_are_served_too():
    from labs.models.configuration import GPTConfig
    from labs.models.gpt import GPT

    config = GPTConfig(width=32, heads=4, kv_heads=2, layers=2, context=64)
    plain, served = GPT(config).double().eval(), GPT(config).double().eval()
    served.load_state_dict(plain.state_dict())
    with torch.no_grad():
        for one in (plain, served):
            for parameter in one.parameters():
                parameter.mul_(4.0)
    layout = Layout("chunked", budget=6, blocks=20, block_size=4)
    one = layout.engine("both", PagedGPT(served, 20, 4))
    one.add(Request(0, tuple(range(40, 61)), 9), 0.0)
    tokens = [event.token for event in run_all([one])[0]]
    assert tokens == plain.generate(torch.tensor([list(range(40, 61))]), 9)[0, 21:].tolist()


def test_in_float32_by_the_kernel_each_token_is_the_likeliest_up_to_rounding():
    """What ``perflab run serving`` proves: two tokens may be as likely but for rounding, and then either is
    right."""
    from labs.serving.proof import shortfall

    layout = Layout("chunked", budget=20, **SMALL)
    one = layout.engine("both", PagedGPT(model().float(), layout.blocks, layout.block_size))
    for each in REQUESTS:
        one.add(each, 0.0)
    tokens = tokens_of(run_all([one]))
    for each in REQUESTS:
        assert shortfall(plain(), each.prompt, tokens[each.number]) < 1e-4
        wrong = [*tokens[each.number][:-1], (tokens[each.number][-1] + 1) % 256]
        assert shortfall(plain(), each.prompt, wrong) > 1e-2


def test_a_compiled_step_stays_within_the_context():
    executor = PagedGPT(model().float(), 40, 4)
    beyond = Running(Request(0, (1,) * 128, 9), 0.0, [1] * 129, computed=128, blocks=list(range(33)))
    with pytest.raises(ValueError, match="position 128 does not fit the context of 128"):
        executor.run([Work(beyond, 128, 1)])


def test_a_step_of_many_sequences_is_that_of_each_alone():
    """More than the six rows that a product takes at a time, of all lengths, in blocks in no order."""
    executor, rows = PagedGPT(model().float(), 120, 4), []
    for number in range(15):
        tokens = [(7 * number + place) % 256 for place in range(1 + 2 * number)]
        blocks = [(number + 15 * place) % 120 for place in range(8)]
        rows.append(Running(Request(number, tuple(tokens), 9), 0.0, tokens, blocks=blocks))
        if len(tokens) > 2:
            executor.run([Work(rows[-1], 0, len(tokens) - 1)])
    works = [Work(each, len(each.tokens) - 1, 1) for each in rows]
    together = executor.run(works)
    assert together == [executor.run([work])[0] for work in works]
    compiled, executor.decode = executor.decode, None
    assert together == executor.run(works)
    assert compiled is not None


# --- policies ----------------------------------------------------------------------------------------


def running(prompt, computed=0, written=0):
    request = Request(0, tuple(range(prompt)), 50)
    return Running(request, 0.0, list(range(prompt + written)), computed=computed, blocks=[])


def test_prefill_first_takes_whole_prompts_that_fit_and_one_always():
    writing = [running(3, 3, 1)]
    works = prefill_first([running(100), running(5), running(5)], writing, 106)
    assert [(work.start, work.count) for work in works] == [(0, 100), (0, 5)]
    assert [work.count for work in prefill_first([running(100), running(5)], writing, 10)] == [100]
    assert [work.count for work in prefill_first([], writing, 10)] == [1]


def test_chunked_stalls_nobody_and_fills_the_budget():
    writing = [running(3, 3, 1) for _ in range(5)]
    works = chunked([running(30, 12), running(40)], writing, 50)
    assert [(work.start, work.count) for work in works] == [(3, 1)] * 5 + [(12, 18), (0, 27)]
    assert [work.writes for work in works] == [True] * 6 + [False]
    crowded = chunked([running(30)], writing * 20, 50)
    assert len(crowded) == 101
    assert crowded[-1].count == LEAST_CHUNK  # nobody starves


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(1, 80))
def test_pieces_of_prompts_add_up_to_the_whole(lengths, budget):
    """A simulation that charged them otherwise made textbook results out of a bug."""
    chunks, whole = [], []
    for policy, shapes in ((chunked, chunks), (prefill_first, whole)):
        one = Engine(Nothing(4, 1), BlockPool(200, 4), policy, budget)
        for number, length in enumerate(lengths):
            one.add(Request(number, (number,) * length, 1), 0.0)
        while (step := one.step()) is not None:
            shapes.append(step.shape)
    for shapes in (chunks, whole):
        assert sum(shape.new + shape.decodes for shape in shapes) == sum(lengths)
        pairs = sum(shape.pairs + shape.context for shape in shapes)
        assert pairs == sum(length * (length + 1) // 2 for length in lengths)


def test_a_step_reads_or_writes_anew_after_another_kind_and_after_idling():
    layout = Layout("prefill_first", budget=64, blocks=64, block_size=4)
    engine = layout.engine("both", Nothing(4, 1))

    def anew(engine):
        found = []
        while (step := engine.step()) is not None:
            found.append((step.shape.reading_anew, step.shape.writing_anew))
        return found

    for number in range(2):
        engine.add(Request(number, (number,) * 40, 4), 0.0)  # too long for one step
    assert anew(engine) == [(1, 0), (0, 0), (0, 1), (0, 0), (0, 0)]
    engine.add(Request(2, (2,) * 9, 2), 0.0)
    assert anew(engine) == [(1, 0), (0, 1)]
    engine.receive(HandOver(Request(3, (3,) * 10, 4, written=1), None, 0), 0.0)
    assert anew(engine) == [(0, 1), (0, 0), (0, 0)]
    chunks = dataclasses.replace(layout, policy="chunked", budget=6).engine("both", Nothing(4, 1))
    chunks.add(Request(0, (1,) * 4, 8), 0.0)
    chunks.step()
    chunks.step()
    chunks.add(Request(1, (2,) * 12, 1), 0.0)
    assert anew(chunks)[:4] == [(1, 0), (0, 1), (0, 1), (0, 0)]


def test_shape_of_a_mixed_batch():
    works = [Work(running(7, 7, 1), 7, 1), Work(running(20), 8, 4), Work(running(20), 0, 3)]
    shape = shape_of(works)
    assert (shape.prompts, shape.new, shape.decodes, shape.context, shape.earlier) == (2, 7, 1, 8, 8)
    assert shape.pairs == (9 + 10 + 11 + 12) + (1 + 2 + 3)


# --- blocks ------------------------------------------------------------------------------------------

prompts = st.lists(st.integers(0, 2), min_size=1, max_size=14)
actions = st.lists(
    st.tuples(st.sampled_from(["add", "step", "abort"]), prompts, st.integers(1, 6)), max_size=40
)


@given(actions, st.sampled_from(["prefill_first", "chunked"]), st.integers(6, 12))
@settings(max_examples=120)
def test_blocks_are_held_by_who_needs_them_and_shared_by_equal_tokens(actions, policy, blocks):
    """After any history: each active sequence has blocks of its own or shares those with its own tokens; when
    all is done none is held."""
    layout = Layout(policy, blocks=blocks, block_size=3, budget=5, most=3)
    pool_of = layout.engine("both", Nothing(3, 1))
    holds: dict[tuple[int, int], tuple[int, ...]] = {}  # (block, request) -> tokens up to its end

    def check():
        pool, counted = pool_of.pool, {}
        for each in pool_of.active:
            assert len(each.blocks) == len(set(each.blocks)) >= pool.needed(each.request.total - 1)
            for index, block in enumerate(each.blocks):
                counted[block] = counted.get(block, 0) + 1
                if (index + 1) * 3 <= each.computed:
                    told = tuple(each.tokens[: (index + 1) * 3])
                    assert holds.setdefault((block, each.request.number), told) == told
        assert pool.held == len(counted)
        for block, count in counted.items():
            if count > 1:  # shared: equal tokens up to there, in each
                rows = {
                    tuple(each.tokens[: (each.blocks.index(block) + 1) * 3])
                    for each in pool_of.active
                    if block in each.blocks
                }
                assert len(rows) == 1

    for number, (action, prompt, output) in enumerate(actions):
        if action == "add":
            with suppress(ValueError):  # too long for this cache
                pool_of.add(Request(number, tuple(prompt), output), 0.0)
        elif action == "step":
            pool_of.step()
        elif pool_of.active:
            pool_of.abort(pool_of.active[0].request.number)
        check()
    for _ in range(1000):
        if pool_of.step() is None:
            break
    assert pool_of.idle
    assert pool_of.pool.held == 0
    assert pool_of.pool.free == blocks


def test_a_known_beginning_is_found_until_it_is_overwritten():
    pool = BlockPool(4, 2)
    held = pool.hold([], 2)
    pool.publish(held, [1, 2, 3, 4], 0, 2)
    assert pool.match([1, 2, 3, 4, 5]) == held
    assert pool.match([1, 2, 9, 4]) == held[:1]
    assert pool.match([3, 4]) == []  # the same tokens elsewhere have other keys
    pool.release(held)
    assert pool.match([1, 2, 3, 4]) == held  # free, and still known
    other = pool.hold([], 3)
    assert pool.match([1, 2, 3, 4]) == held[:1]  # the end goes first
    pool.release(other)
    with pytest.raises(ValueError, match="is released, and nobody holds it"):
        pool.release(other)


def test_a_full_cache_lets_requests_wait_in_order():
    one = Layout("chunked", blocks=4, block_size=4, budget=64).engine("both", Nothing(4, 1))
    for number in range(3):
        one.add(Request(number, tuple(range(number * 10, number * 10 + 9)), 4), 1.0)
    one.step()
    assert len(one.active) == 1
    assert [each.request.number for each in one.active] == [0]
    order = []
    while (step := one.step()) is not None:
        order += [event.number for event in step.events if event.finished]
    assert order == [0, 1, 2]
    with pytest.raises(ValueError, match="room for 17 tokens of keys and values; the cache has 16"):
        one.add(Request(9, (1,) * 9, 9), 0.0)


def test_what_is_handed_over_waits_for_blocks_and_is_not_sent_twice():
    last = Layout("disaggregated", blocks=4, block_size=4).engine("decode", Nothing(4, 1))
    for number in (0, 1):
        last.receive(HandOver(Request(number, (number,) * 10, 4, written=1), None, 1), 0.0)
    last.step()
    assert len(last.active) == 1
    assert len(last.handed) == 1
    found = run_all([last])
    assert [event.place for event in found[1]] == [1, 2, 3]
    assert last.pool.held == 0


LAYOUT = Layout("disaggregated", blocks=20, block_size=4)


def worker_of(clock, reports):
    """Its clock moves only while it computes (1 s), takes out (10 s), sends (100 s) or stores (1000 s)."""

    class Slow(Nothing):
        def run(self, works):
            clock[0] += 1.0
            return super().run(works)

        def take_out(self, blocks, tokens):
            clock[0] += 10.0
            return super().take_out(blocks, tokens)

        def put_in(self, blocks, payload, skipped):
            clock[0] += 1000.0
            return super().put_in(blocks, payload, skipped)

    def share(payload):
        clock[0] += 100.0
        return payload

    worker = Worker(Model(64, 1, 64), lambda: clock[0], reports.append, share)
    worker._caches = {(20, 4): _Packing(Slow(4, 1), worker.now)}
    return worker


def run_one_step(worker, reports, *messages):
    worker.put(messages)
    end = time.monotonic() + 30
    while len(reports) < 2:
        assert time.monotonic() < end, "waited 30 s for the step"
        time.sleep(0.01)
    worker.put([Stop()])
    worker._thread.join(30)


def test_what_is_taken_out_is_no_part_of_the_step():
    clock, reports = [0.0], []
    worker = worker_of(clock, reports)
    both = (Add(Request(number, (number,) * 9, 3)) for number in range(2))
    run_one_step(worker, reports, Reset(LAYOUT, "prefill", 0), *both)
    step = reports[-1]
    assert (step.began, step.ended, step.free) == (0.0, 1.0, 221.0)
    assert step.stayed == [1.0, 1.0]
    assert step.stored == []
    assert step.held == 0


def test_what_is_stored_is_no_part_of_the_step():
    clock, reports = [0.0], []
    worker = worker_of(clock, reports)
    hand_over = HandOver(Request(0, (1,) * 9, 2, written=1), None, 12)
    run_one_step(worker, reports, Reset(LAYOUT, "decode", 0), Receive(hand_over))
    step = reports[-1]
    assert step.stored == [(8, 1000.0)]  # two blocks of four tokens: the last token is computed here
    assert (step.began, step.ended, step.free) == (1000.0, 1001.0, 1001.0)
    assert step.stayed == [1001.0]


def test_a_workers_collector_does_not_look_at_its_model():
    before, reports = Witness(), []
    assert before.looked_at
    worker = Worker(Model(64, 1, 64), time.monotonic, reports.append)
    run_one_step(worker, reports, Reset(LAYOUT, "both", 0), Add(Request(0, (1,) * 9, 1)))
    assert not before.looked_at


def test_an_aborted_request_leaves_nothing_wherever_it_stands():
    first = engine("disaggregated", "prefill")
    last = engine("disaggregated", "decode")
    for number in range(4):
        first.add(Request(number, (number,) * 20, 5), 0.0)
    first.abort(3)
    hand_overs = [event for event in first.step().events if isinstance(event, HandOver)]
    for event in hand_overs:
        last.receive(event, 0.0)
    last.abort(0)
    last.step()
    last.abort(1)
    last.abort(77)
    found = run_all([last])
    assert set(found) == {2}
    assert first.pool.held == last.pool.held == 0


# --- wrong input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Request(0, (), 1), "the prompt is empty"),
        (lambda: Request(0, (1,), 0), "writes at least 1"),
        (lambda: Request(0, (1,), 1, temperature=float("nan")), "must be a number of at least 0"),
        (lambda: Layout("chunkd"), "there is no policy 'chunkd'; did you mean 'chunked'"),
        (lambda: Layout("disaggregated", workers=1), "has at least 1 of each"),
        (lambda: Layout("disaggregated", prefill=0), "0 prefill and 2 decode workers"),
        (lambda: Layout("chunked", workers=0), "workers=0 must be at least 1"),
        (lambda: BlockPool(0, 4), "both must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_another_models_keys_are_refused():
    one, payload = engine("chunked"), torch.zeros(2, 2, 2, 4, 1, 32).numpy()
    with pytest.raises(ValueError, match="this model has"):
        one.executor.put_in([0, 1], payload, 0)


@pytest.mark.parametrize(
    "name", ["engine", "policies", "blocks", "request", "layout", "dispatch", "simulator"]
)
def test_the_engine_knows_no_clock_no_process_and_no_ray(name):
    tree = ast.parse(inspect.getsource(import_module(f"labs.serving.{name}")))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    packages = {each.partition(".")[0] for each in names}
    if name == "simulator":
        packages.remove("random")  # what it draws is fixed by a seed
    assert packages <= {
        "__future__",
        "collections",
        "dataclasses",
        "heapq",
        "itertools",
        "labs",
        "math",
        "typing",
    }
