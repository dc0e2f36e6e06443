"""What the timeline draws: rows without overlap, every slice once, what is left out counted."""

import time

import numpy as np
import pytest
from drawn_job import MS, bottomless, job, many, trace_of, training, unpacked
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.traces.events import Events, Kind, Lane
from bench.traces.page import render_trace_page
from bench.traces.page.packing import EXACT, Words, data_block, pack, pack_signed
from bench.traces.page.reports import shifted
from bench.traces.page.timeline import MOST_LANES, MOST_ROWS, MOST_STEPS, rows_of, timeline
from bench.traces.tree import ROUNDING_NS, parents


def drawn(*traces, most=10**6, clocks=None):
    clocks = clocks or [shifted(0)] * len(traces)
    return timeline(list(traces), clocks, [f"rank {i}" for i in range(len(traces))], Words(), most)


# --- numbers as text ---------------------------------------------------------------------------------


@given(st.lists(st.one_of(st.integers(0, 300), st.integers(0, EXACT))))
def test_packed_numbers_come_back(numbers):
    assert unpacked(pack(np.array(numbers, np.int64))) == numbers


@given(st.lists(st.integers(-(2**51), 2**51)))
def test_negative_numbers_are_folded_between_the_others(numbers):
    folded = unpacked(pack_signed(np.array(numbers, np.int64)))
    assert [-(code + 1) // 2 if code % 2 else code // 2 for code in folded] == numbers


@pytest.mark.parametrize("numbers", [[-1], [EXACT + 1]])
def test_what_the_script_could_not_hold_is_refused(numbers):
    with pytest.raises(ValueError, match=r"0 \.\.\. 2\*\*53"):
        pack(np.array(numbers))


def test_no_text_ends_the_block_of_data():
    block = data_block({"name": "</script><!--&\u2028"})
    assert not set("<>&\u2028") & set(block)


def test_names_are_kept_once_printable_and_cut():
    words = Words(longest=10)
    assert [words.number(name) for name in ("a", "b\x1b\u202e", "a", "x" * 10**6)] == [0, 1, 0, 2]
    assert words.texts == ["a", "b\ufffd\ufffd", "x" * 9 + "…"]
    assert words.cut == 1


def test_a_million_of_names_is_cut_shorter_and_shorter():
    words = Words(longest=400, room=10_000)
    numbers = [words.number(f"{i} {'x' * 1000}") for i in range(100)]
    assert sum(map(len, words.texts)) < 10_500
    assert {len(text) for text in words.texts} == {400, 60, len("(no room for this name)")}
    assert words.texts[numbers[-1]] == words.texts[numbers[-2]] == "(no room for this name)"
    assert words.cut == 100


# --- rows --------------------------------------------------------------------------------------------

SPANS = st.lists(
    st.tuples(
        st.integers(0, 1), st.integers(0, 40_000), st.one_of(st.integers(0, 3000), st.integers(0, 40_000))
    ),
    max_size=40,
)


@given(SPANS)
@settings(max_examples=150)
def test_slices_of_a_row_do_not_overlap(spans):
    events = Events.of(
        lane=[lane for lane, _, _ in spans],
        start=[start for _, start, _ in spans],
        duration=[duration for _, _, duration in spans],
        name=np.zeros(len(spans)),
        kind=np.zeros(len(spans)),
    )
    above = parents(events)
    row = rows_of(events, above)
    for one in range(len(events)):
        for other in range(one):
            if row[one] >= 0 and (events.lane[one], row[one]) == (events.lane[other], row[other]):
                shared = min(events.end[one], events.end[other]) - max(events.start[one], events.start[other])
                assert shared <= ROUNDING_NS
        if above[one] >= 0 and row[one] >= 0:
            assert row[one] != row[above[one]]


def test_children_stand_below_and_what_crosses_stands_below_all():
    rows = [("parent", Kind.OPERATOR, 0, 0, 50_000, -1), ("child", Kind.OPERATOR, 0, 10_000, 20_000, -1)]
    crossing = ("crossing", Kind.OPERATOR, 0, 40_000, 50_000, -1)
    events = trace_of([*rows, crossing]).events
    assert rows_of(events, parents(events)).tolist() == [0, 1, 2]


def test_a_bottomless_stack_is_cut_and_quick():
    depth = 100_000
    events = bottomless(depth)
    begun = time.process_time()
    row = rows_of(events, np.arange(-1, depth - 1))
    assert time.process_time() - begun < 5
    assert row.tolist() == [*range(MOST_ROWS), *[-1] * (depth - MOST_ROWS)]


# --- what is sent ------------------------------------------------------------------------------------


def test_every_slice_is_sent_once_in_order_of_its_row():
    trace = training()
    words = Words()
    data = timeline([trace], [shifted(5 * MS)], [""], words).data
    start = np.cumsum([-(code + 1) // 2 if code % 2 else code // 2 for code in unpacked(data["start"])])
    lanes = data["groups"][0]["lanes"]
    assert [(lane["name"], lane["rows"]) for lane in lanes] == [
        ("device 0 · stream 7", [8]),
        ("thread 7 (python)", [4, 4, 4, 4]),
    ]
    names = [words.texts[code] for code in unpacked(data["name"])]
    kinds = [data["kinds"][code] for code in unpacked(data["kind"])]
    length = unpacked(data["duration"])
    # The first row is the device's: gemm and all_reduce in turns, from the trace's first start.
    assert list(zip(names, kinds, start.tolist(), length, strict=True))[:3] == [
        ("gemm", "kernel", 2 * MS, 2 * MS),
        ("all_reduce", "communication", 7 * MS, MS),
        ("gemm", "kernel", 12 * MS, 2 * MS),
    ]
    shapes = [code and words.texts[code - 1] for code in unpacked(data["shape"])]
    assert {(name, shape) for name, shape in zip(names, shapes, strict=True) if shape} == {
        ("aten::mm", "[[64, 32], [32, 16]]")
    }
    launch = unpacked(data["launch"])
    assert [names[code - 1] for code in launch if code] == ["cudaLaunchKernel"] * 4
    assert [words.texts[step[0]] for step in data["groups"][0]["steps"]] == [
        f"ProfilerStep#{i}" for i in range(4)
    ]


def test_ranks_stand_on_one_clock():
    data = drawn(training(0), training(1), clocks=[shifted(0), shifted(3 * MS)]).data
    begin = [group["steps"][0][1] for group in data["groups"]]
    assert begin == [0, 3 * MS]


def test_of_too_many_slices_the_shortest_are_left_out_and_counted():
    trace = many(20_000)
    shown = drawn(trace, most=5000)
    assert shown.slices == 5000
    ((why, count),) = shown.left_out.items()
    assert count == len(trace.events) - 5000
    longest = np.sort(trace.events.duration)[-5000:]
    assert sorted(unpacked(shown.data["duration"])) == longest.tolist()
    assert f"none above {longest[0] / 1000:.3g} us" in why


def test_damaged_times_do_not_stretch_the_timeline():
    rows = [("work", Kind.OPERATOR, 0, step * MS, MS // 2, -1) for step in range(9)]
    wild = [("lost", Kind.OPERATOR, 0, at, MS, -1) for at in (-(2**62), 2**62)]
    wild.append(("endless", Kind.OPERATOR, 0, 0, 2**62, -1))
    shown = drawn(trace_of([*rows, *wild]))
    assert (shown.slices, dict(shown.left_out)) == (9, {"slices more than 13 days from most others": 3})


def test_a_lane_of_calls_that_cross_has_rows_for_all_that_fit():
    rows = [("call", Kind.COMMUNICATION, 0, i * 2000, 2000 * 60, -1) for i in range(60)]
    shown = drawn(trace_of(rows, [Lane("p", "t")]))
    assert shown.slices + sum(shown.left_out.values()) == 60
    assert 0 < sum(shown.left_out.values()) < 40


def test_of_too_many_lanes_and_steps_the_rest_is_counted():
    lanes = [Lane("p", f"thread {i}") for i in range(MOST_LANES + 5)]
    rows = [("work", Kind.OPERATOR, i, 0, MS + i, -1) for i in range(len(lanes))]
    rows += [(f"step {i}", Kind.STEP, 0, 2 * MS + i * 10, 10, -1) for i in range(MOST_STEPS + 3)]
    shown = drawn(trace_of(rows, lanes))
    assert len(shown.data["groups"][0]["lanes"]) == MOST_LANES
    assert len(shown.data["groups"][0]["steps"]) == MOST_STEPS
    assert dict(shown.left_out) == {
        f"slices of all but {MOST_LANES} lanes": 5,
        "marks of steps above the lanes": 3,
    }


def test_the_page_of_200_000_slices_is_small():
    page = render_trace_page(job(many(200_000)))
    assert len(page.encode()) < 6_000_000
    assert "names are too long for a page" not in page


def test_a_page_has_no_room_for_every_name_that_there_could_be():
    trace = many(40_000)
    trace.events.name = np.arange(len(trace.events), dtype=np.int32)
    trace.names = [f"{i} {'x' * 300}" for i in range(len(trace.events))]
    page = render_trace_page(job(trace))
    assert len(page.encode()) < 6_000_000
    assert "names are too long for a page" in page
