"""The simulator against the plainest execution, against PyTorch's schedules, and at size."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_schedules import end_times

from parallel import schedules
from parallel.schedules import Durations, Link

seconds = st.floats(0.1, 5.0)


@st.composite
def costs(draw, stages):
    def per_stage():
        return draw(st.one_of(seconds, st.lists(seconds, min_size=stages, max_size=stages)))

    durations = Durations(per_stage(), per_stage(), per_stage(), draw(st.one_of(st.none(), seconds)))
    size = st.floats(0, 3)
    sizes = draw(st.one_of(size, st.lists(size, min_size=stages, max_size=stages)))
    link = Link(draw(st.floats(0, 2)), draw(st.floats(0, 1)), sizes, draw(st.floats(0, 0.5)))
    return durations, link, draw(st.floats(0, 0.5))


@settings(max_examples=100)
@given(st.data(), st.sampled_from(schedules.NAMES), st.integers(1, 5), st.integers(1, 9))
def test_every_action_happens_when_it_does_in_plain_execution(data, name, p, m):
    schedule = schedules.build(name, p, m)
    durations, link, overhead = data.draw(costs(schedule.stages))
    timeline = schedules.simulate(schedules.with_communication(schedule), durations, link, overhead)
    expected = end_times(schedule, durations, link, overhead)
    rows = zip(timeline.kind, timeline.stage, timeline.microbatch, timeline.start, timeline.end, strict=True)
    for kind, stage, micro, start, end in rows:
        assert (start, end) == pytest.approx(expected[kind, stage, micro], rel=1e-12)
    assert timeline.step == max(end for _, end in expected.values())
    assert timeline.efficiency * timeline.step == pytest.approx(timeline.busy.mean())


def test_bubble_and_overhead_are_apart():
    """On one rank nothing waits: all that is lost is overhead."""
    schedule = schedules.build("1f1b", 1, 4)
    timeline = schedules.simulate(schedule, Durations(1.0, 1.0, 1.0), overhead=0.5)
    assert timeline.step == 4 * 3 + 8 * 0.5
    assert timeline.bubble == pytest.approx(0, abs=1e-12)
    assert timeline.efficiency == 12 / 16


def test_messages_of_a_rank_leave_one_after_the_other():
    """Rank 0 computes in no time; its two outputs take 3 s each on the link."""
    schedule = schedules.build("gpipe", 2, 2)
    timeline = schedules.simulate(schedule, Durations([0.0, 1.0], 0.0, 0.0), Link(1.0, 0.5, [4.0, 0.0]))
    second = (timeline.stage == 1) & (timeline.kind == schedules.Kind.FORWARD)
    assert timeline.start[second].tolist() == [3.0, 6.0]


def test_a_gradient_is_as_large_as_the_activation_it_belongs_to():
    """What leaves stage 0 takes 3 s, also on its way back; what leaves stage 1, 5 s."""
    schedule = schedules.build("gpipe", 3, 1)
    timeline = schedules.simulate(schedule, Durations(0.0, 0.0, 0.0), Link(0.0, 1.0, [3.0, 5.0, 9.0]))
    assert timeline.start.tolist() == [0.0, 16.0, 3.0, 13.0, 8.0, 8.0]


@pytest.mark.parametrize("size", [1, [10.0, 1.0]])
def test_activations_are_held_until_the_last_backward_that_needs_them(size):
    schedule = schedules.parse("placement 0 0\n0: 0F0 1F0 1I0 0I0 1W0 0W0")
    whole = {1: 2, (10.0, 1.0): 11}[size if size == 1 else tuple(size)]
    assert schedules.peak_activations(schedule, size).tolist() == [whole]
    late = schedules.parse("placement 0\n0: 0F0 0I0 0F1 0I1 0W0 0W1")
    assert schedules.peak_activations(late).tolist() == [2]
    assert schedules.peak_activations(late, kept=0.25).tolist() == [1.25]


@pytest.mark.parametrize(
    ("durations", "message"),
    [
        (Durations([1.0, 1.0], 1.0, 1.0), "durations of 2 stages do not fit a schedule of 3 stages"),
        (Durations(-1.0, 1.0, 1.0), "durations must be numbers of 0 or more, not -1"),
        (Durations(float("nan"), 1.0, 1.0), "durations must be numbers of 0 or more, not nan"),
    ],
)
def test_durations_that_do_not_fit_are_named(durations, message):
    with pytest.raises(ValueError, match=message):
        schedules.simulate(schedules.build("1f1b", 3, 2), durations)


def test_ranks_that_wait_for_one_another_are_named():
    schedule = schedules.parse("name mine\nplacement 0 1\n0: 0F0 0B0 0F1 0B1\n1: 1F1 1B1 1F0 1B0")
    with pytest.raises(
        ValueError, match=r"mine: rank 0, position 1: 0B0 waits for ever, for rank 1, position 3: 1B0"
    ):
        schedules.simulate(schedule, Durations(1.0, 1.0, 1.0))


PEERS = {  # without its 1F1B, whose text (not what it runs) numbers the last rank's forwards from 1 in 2.13
    "gpipe": "ScheduleGPipe",
    "interleaved_1f1b": "ScheduleInterleaved1F1B",
    "looped_bfs": "ScheduleLoopedBFS",
    "zb_v": "ScheduleZBVZeroBubble",
    "dualpipe_v": "ScheduleDualPipeV",
}


def text_of_torch(kind, p, m, tmp_path):
    """What PyTorch writes for its schedule of p ranks, made without a process group."""
    from torch.distributed.pipelining import schedules as theirs

    schedule = object.__new__(getattr(theirs, kind))
    per_rank = 1 if kind == "ScheduleGPipe" else 2
    schedule._n_microbatches = m
    schedule.pp_group_size, schedule.n_local_stages, schedule._num_stages = p, per_rank, p * per_rank
    schedule._stages = [None] * per_rank
    schedule.num_stages = p * per_rank
    schedule.number_of_rounds = max(1, m // p)
    schedule.microbatches_per_round = m // schedule.number_of_rounds
    if per_rank == 1:
        schedule.pipeline_order = schedule._get_pipeline_order()
    else:
        schedule.pipeline_order = {
            rank: schedule._calculate_single_rank_operations(rank) for rank in range(p)
        }
    file = tmp_path / f"{kind}.csv"
    rows = [",".join("" if a is None else str(a) for a in schedule.pipeline_order[rank]) for rank in range(p)]
    file.write_text("\n".join(rows) + "\n")
    return file


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (4, 16)])
@pytest.mark.parametrize("name", PEERS)
def test_pytorchs_own_schedule_is_read_and_takes_as_long(name, p, m, tmp_path):
    theirs = schedules.load(text_of_torch(PEERS[name], p, m, tmp_path))
    ours = schedules.build(name, p, m)
    assert theirs.placement == ours.placement
    for durations in (Durations(1.0, 1.0, 1.0), Durations(1.0, 1.5, 0.7)):
        assert schedules.simulate(theirs, durations).step == pytest.approx(
            schedules.simulate(ours, durations).step
        )


LARGE = """
import resource
from parallel import schedules
schedule = schedules.build("1f1b", 256, 4096)
timeline = schedules.simulate(schedule, schedules.Durations(1.0, 1.0, 1.0))
assert abs(timeline.bubble - schedules.bubble("1f1b", 256, 4096)) < 1e-12
used = resource.getrusage(resource.RUSAGE_SELF)
assert used.ru_utime + used.ru_stime < 20, used
# ru_maxrss would be that of the process that started this one, where it is larger
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
assert peak * 1024 < 2e9, peak
"""


def test_256_stages_and_4096_microbatches_are_simulated_in_seconds():
    """Of CPU time, which other lanes do not lengthen."""
    subprocess.run([sys.executable, "-c", LARGE], check=True, timeout=110)
