"""Two jobs side by side: rows that sum to the change, and a sentence that says what happened."""

import pytest
from seeded_traces import MS, job, loop

from bench.traces.diff import difference
from bench.traces.diff_sentence import shapes, short_name

WORK = {"aten::mm": 4.0, "aten::add": 1.0, "aten::relu": 2.0}


def compared(base, new, steps=12, **options):
    return difference(job(loop(base, steps, **options)), job(loop(new, steps, **options)))


def first(found):
    row = found.rows[0]
    return row.name, row.change, row.verdict, round(row.seconds * 1e6)


@pytest.mark.parametrize(
    "kernels", [None, dict.fromkeys((*WORK, "aten::new"), "kernel")], ids=["host", "device"]
)
def test_rows_sum_to_the_change_of_the_step(kernels):
    found = compared(WORK, {**WORK, "aten::mm": 4.8, "aten::new": 0.5}, noise=0.01, kernels=kernels)
    assert sum(row.seconds for row in found.rows) == pytest.approx(found.seconds)
    assert found.seconds == pytest.approx(1.3e-3, rel=0.2)


def test_a_slower_operation():
    found = compared(WORK, {**WORK, "aten::mm": 4.8})
    assert first(found) == ("aten::mm", "", "slower", 800)
    assert found.sentence == (
        "the step is 10.7 % slower (+800 us of 7.50 ms): aten::mm [64,32]x[32,16] takes 800 us more"
    )


def test_an_added_and_a_removed_operation():
    added = compared(WORK, {**WORK, "aten::new": 0.5})
    assert first(added) == ("aten::new", "added", "slower", 500)
    assert "aten::new [64,32]x[32,16] was added (+500 us)" in added.sentence
    removed = compared({**WORK, "aten::new": 0.5}, WORK)
    assert first(removed) == ("aten::new", "removed", "faster", -500)
    assert "6.3 % faster (-500 us of 8.00 ms)" in removed.sentence


def test_more_exposed_communication():
    found = compared({**WORK, "gloo:all_reduce": 1.0}, {**WORK, "gloo:all_reduce": 1.5})
    assert found.rows[0].what == "communication"
    assert "exposed communication in gloo:all_reduce takes 500 us more" in found.sentence


def test_other_kernels_of_the_same_operator():
    base = loop(WORK, kernels=dict.fromkeys(WORK, "nvidia"), device="H100")
    new = loop({**WORK, "aten::mm": 5.0}, kernels=dict.fromkeys(WORK, "amd"), device="MI300")
    found = difference(job(base), job(new))
    assert first(found) == ("aten::mm", "other kernels", "slower", 1000)
    assert (found.rows[0].base_kernels[0][0], found.rows[0].new_kernels[0][0]) == ("nvidia", "amd")
    assert "different devices: H100 and MI300" in found.notes
    assert found.alike == 1.0


def test_other_shapes():
    larger = loop({**WORK, "aten::mm": 6.0}, shape="[[128, 32], [32, 16]]")
    found = difference(job(loop(WORK)), job(larger))
    assert first(found) == ("aten::mm", "other shapes", "slower", 2000)
    assert "(now [128,32]x[32,16])" in found.sentence


def test_an_unchanged_pair_is_same():
    found = compared(WORK, WORK)
    assert found.step.verdict == "same"
    assert found.sentence == "same: the step takes 7.50 ms and 7.50 ms, and no operation differs"


def test_few_steps_rank_and_do_not_judge():
    found = compared(WORK, {**WORK, "aten::mm": 4.8}, steps=2)
    assert first(found) == ("aten::mm", "", "undecidable", 800)
    assert found.rows[0].low is None
    assert found.sentence.startswith(
        "the step took 7.50 ms and now 8.30 ms (+800 us, 10.7 %); 2 steps cannot tell"
    )


def test_a_host_operator_that_takes_no_time_of_the_device_is_told():
    base = loop(WORK, kernels=dict.fromkeys(WORK, "kernel"))
    new = loop(WORK, kernels=dict.fromkeys(WORK, "kernel"), around="aten::detach")
    base.names = [name or "aten::view" for name in base.names]
    rows = [row for row in difference(job(base), job(new)).rows if row.what == "host"]
    assert [(row.name, row.change, row.seconds) for row in rows] == [("aten::detach", "added", 0.0)]


def test_ranks_are_matched_by_number_and_averaged():
    def ranks(*milliseconds):
        traces = [loop({**WORK, "aten::mm": ms}, rank=rank) for rank, ms in enumerate(milliseconds)]
        return job(*traces)

    found = difference(ranks(4.0, 4.0), ranks(4.0, 5.0))
    assert first(found) == ("aten::mm", "", "slower", 500)
    assert [(r.rank, round((r.new_seconds - r.base_seconds) * 1e6)) for r in found.ranks] == [
        (0, 0),
        (1, 1000),
    ]
    lacking = difference(ranks(4.0, 4.0, 4.0), ranks(4.0, 4.0))
    assert any("left out: rank 2" in note for note in lacking.notes)


def test_what_was_not_read_is_counted_over_the_ranks():
    ranks = [loop(WORK, rank=rank) for rank in range(2)]
    for trace in ranks:
        trace.dropped["slices without a duration"] = 3
        trace.unclassified["fog"] = 1
    notes = " ".join(difference(job(*ranks, source="base"), job(*ranks, source="new")).notes)
    assert "base: left out: 6 slices without a duration" in notes
    assert "new: of unknown kind, in no sum: 2 fog" in notes


def test_no_rank_in_common_is_an_error():
    base = job(loop(WORK, rank=0), loop(WORK, rank=1))
    new = job(loop(WORK, rank=2), loop(WORK, rank=3))
    with pytest.raises(ValueError, match="no rank is in both"):
        difference(base, new)


def test_recordings_one_after_another_count_as_one():
    def recordings(offset, mm=4.0):
        traces = []
        for turn in range(6):
            trace = loop({**WORK, "aten::mm": mm}, steps=2)
            trace.origin_ns = 10**18 + (2 * turn + offset) * 100 * MS
            traces.append(trace)
        return job(*traces)

    found = difference(recordings(0), recordings(1, mm=4.8))
    assert (found.base_steps, found.new_steps, found.in_turns) == (12, 12, 11)
    assert first(found) == ("aten::mm", "", "slower", 800)


def recorded(rank, turn, mm=4.0, world=2):
    """A recording of 12 steps of a rank, the first turn or the second."""
    trace = loop({**WORK, "aten::mm": mm}, rank=rank)
    trace.world_size, trace.origin_ns = world, 10**18 + 1000 * turn * MS
    trace.source = f"rank{rank}.{turn}.json"
    return trace


def test_several_recordings_of_each_rank_are_that_ranks():
    base = job(*(recorded(rank, turn) for rank in range(2) for turn in range(2)))
    new = job(*(recorded(rank, turn, mm=4.0 + rank) for rank in range(2) for turn in range(2)))
    found = difference(base, new)
    assert [(one.rank, round(1e6 * (one.new_seconds - one.base_seconds))) for one in found.ranks] == [
        (0, 0),
        (1, 1000),
    ]
    assert (found.base_steps, found.new_steps) == (24, 24)
    assert "made: rank 1: 2 recordings, made one after another, count as one" in found.notes


def test_a_copy_of_a_recording_adds_no_steps():
    found = difference(job(*(recorded(rank, 0) for rank in (0, 0, 1))), job(recorded(0, 0), recorded(1, 0)))
    assert (found.base_steps, len(found.ranks)) == (12, 2)
    assert any("rank 0: 1 recordings left out" in note for note in found.notes)


def test_ranks_that_recorded_one_after_another_are_still_ranks():
    found = difference(job(recorded(0, 0), recorded(1, 1)), job(recorded(0, 0), recorded(1, 1, mm=5.0)))
    assert [one.rank for one in found.ranks] == [0, 1]
    assert (found.base_steps, first(found)[3]) == (12, 500)
    unsaid = [job(recorded(0, 0, world=-1), recorded(1, 1, mm=mm, world=-1)) for mm in (4.0, 5.0)]
    assert [one.rank for one in difference(*unsaid).ranks] == [0, 1], "names say it too"
    for side in unsaid:
        side.traces[1].rank_made_up = True
    assert len(difference(*unsaid).ranks) < 2, "numbered here, for want of a better"


def test_nothing_to_compare_is_an_error():
    empty = loop(WORK)
    empty.events = empty.events.select([])
    with pytest.raises(ValueError, match="holds no events"):
        difference(job(empty), job(loop(WORK)))


@pytest.mark.parametrize(
    ("text", "short"),
    [("[[64, 32], [32], []]", "[64,32]x[32]"), ("3 shapes", "3 shapes"), ("<b>", ""), ("", "")],
)
def test_shapes_are_written_short(text, short):
    assert shapes(text) == short


def test_names_of_kernels_lose_what_they_are_templates_of():
    kernel = (
        "void at::native::elementwise<4, at::native::Add<float>, Array<char*, 3ul> >(int, Array<char*, 3>)"
    )
    assert short_name(kernel) == "at::native::elementwise<4, at::native::Add, Array >"
    assert short_name(kernel.replace("native", "n" * 40)) == f"at::{'n' * 40}::elementwise"
    assert short_name("a\x1b[31mb\nc") == "a\ufffd[31mb c"
    assert len(short_name("x" * 1_000_000)) <= 60
    assert len(short_name("f" + "<a" * 100_000 + ">" * 100_000)) <= 60  # peeled level by level: hours
