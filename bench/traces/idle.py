"""Why nothing ran: for what a device waited while it was idle, or the host while it was in no operator.

A gap of a device ends when some slice starts. The call that launched this slice divides the gap. Before the
call the device waited for the *host*, and the innermost slice of the launching thread says what the host did
instead. After the call, what was launched had yet to start: *launch latency* when that took no longer than
``LATENCY_NS``; longer, it is the call itself, or *unknown*, because nothing in the report explains it. (HTA
tells host wait, kernel wait and other apart by stream and by the length of a gap; here the launch decides,
and every nanosecond goes somewhere: the reasons sum to the idle time.)

The host's own gaps go by the innermost slice of its main thread, then by waits of its other threads. A stream
that could run but waits for another of its device leaves the device busy: ``stream_waits`` tells of those.
"""

from __future__ import annotations

import numpy as np

from bench.traces.breakdown import HOST, WAITS, Activity, by_length
from bench.traces.causes import Cause, Ledger, Reason
from bench.traces.events import DEVICE_KINDS, Kind, Trace, distinct
from bench.traces.intervals import Intervals, covered, intersect, subtract, total, union
from bench.traces.steps import main_lane

LATENCY_NS = 50_000
"""What finds the device idle starts within this: in 11 of 12 traces of V100, A100, H100 and MI300, nine of
ten slices started 8 to 37 us after the beginning of their launch."""


def idle_reasons(
    trace: Trace,
    activity: Activity,
    parents: np.ndarray,
    launched: np.ndarray,
    within: Intervals | None = None,
) -> list[Reason]:
    """Why the activity's gaps are there, the longest first; the times sum to its idle time.

    parents, launched: of ``bench.traces.tree``. within: only gaps, and parts of gaps, that lie in here.
    """
    gaps = activity.idle() if within is None else intersect(activity.idle(), within)
    ledger = Ledger(trace, parents)
    if activity.device == HOST:
        _attribute_host(ledger, gaps)
    else:
        ended_by = _first_at(trace, _work(trace, activity), gaps.end)
        # At the end of the window nothing may follow: only the host's main thread can say why.
        ends = ended_by >= 0
        if not ends.all():
            rest = ledger.charge_thread(main_lane(trace), _chosen(gaps, ~ends))
            ledger.charge(Cause.UNKNOWN, "nothing is recorded of the host", total(*rest), len(rest.start))
        _attribute_device(ledger, _chosen(gaps, ends), ended_by[ends], launched)
    return ledger.reasons()


def _work(trace: Trace, activity: Activity) -> np.ndarray:
    """Rows of what runs on a device, in order of start."""
    events = trace.events
    on_it = activity.lanes(trace)[events.lane]
    rows = np.flatnonzero(
        on_it & np.isin(events.kind, (*DEVICE_KINDS, Kind.COMMUNICATION)) & (events.duration > 0)
    )
    return rows[np.argsort(events.start[rows], kind="stable")]


def _first_at(trace: Trace, rows: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Of rows in order of start, the first that starts at each of these times or later; -1 after the last."""
    return np.append(rows, -1)[np.searchsorted(trace.events.start[rows], times, "left")]


def _attribute_device(ledger: Ledger, gaps: Intervals, ended_by: np.ndarray, launched: np.ndarray) -> None:
    """ended_by: for each gap the row of the slice that ends it."""
    events, names = ledger.trace.events, ledger.trace.names
    call = launched[ended_by]
    known = call >= 0
    ledger.charge(
        Cause.UNKNOWN, "the launch is not in the report", total(*_chosen(gaps, ~known)), int((~known).sum())
    )
    gaps, call = _chosen(gaps, known), call[known]
    called = np.clip(events.start[call], gaps.start, gaps.end)
    returned = np.clip(events.end[call], called, gaps.end)
    usual = gaps.end - called <= LATENCY_NS
    late_start = ~usual & (gaps.end - returned > LATENCY_NS)
    latency = np.where(usual, gaps.end - called, np.where(late_start, 0, gaps.end - returned))
    ledger.charge(Cause.LATENCY, "", int(latency.sum()), int((latency > 0).sum()))
    unexplained = (gaps.end - returned)[late_start]
    text = "launched, and nothing else ran"
    ledger.charge(Cause.UNKNOWN, text, int(unexplained.sum()), len(unexplained))
    for row, time in zip(call[~usual].tolist(), (returned - called)[~usual].tolist(), strict=True):
        ledger.charge(Cause.RUNTIME, names[events.name[row]], time)
    _attribute_lateness(ledger, Intervals(gaps.start, called), events.lane[call])


def _attribute_lateness(ledger: Ledger, late: Intervals, lanes: np.ndarray) -> None:
    """The host had not launched yet: what did the thread do that launched at last, else the main thread?"""
    some = late.end > late.start
    late, lanes = _chosen(late, some), lanes[some]
    if not len(lanes):
        return
    left = []
    for lane in distinct(lanes).tolist():
        left.append(ledger.charge_thread(lane, _chosen(late, lanes == lane)))
    # A backward thread that has nothing to do yet waits for the main thread.
    rest = union(np.concatenate([each.start for each in left]), np.concatenate([each.end for each in left]))
    rest = ledger.charge_thread(main_lane(ledger.trace), rest)
    ledger.charge(Cause.UNKNOWN, "nothing is recorded of the host", total(*rest), len(rest.start))


def _attribute_host(ledger: Ledger, gaps: Intervals) -> None:
    trace, events = ledger.trace, ledger.trace.events
    main = main_lane(trace)
    rest = ledger.charge_thread(main, gaps)
    others = np.flatnonzero(np.isin(events.kind, WAITS) & (events.lane != main))
    for code, rows in by_length(events.name[others], events.duration[others], others):
        time = intersect(rest, union(events.start[rows], events.end[rows]))
        ledger.charge(Cause.WAIT, trace.names[code], total(*time), len(time.start))
        rest = subtract(rest, time)
    ledger.charge(Cause.UNKNOWN, "nothing is recorded", total(*rest), len(rest.start))


def stream_waits(trace: Trace, activity: Activity, launched: np.ndarray) -> list[Reason]:
    """How long the stream that computes most could not go on, though launched, while other streams ran."""
    events = trace.events
    rows = _work(trace, activity)
    kernels = rows[events.kind[rows] == Kind.KERNEL]
    if not len(kernels) or len(distinct(events.lane[rows])) < 2:
        return []
    busiest = int(np.bincount(events.lane[kernels], weights=events.duration[kernels]).argmax())
    own, others = rows[events.lane[rows] == busiest], rows[events.lane[rows] != busiest]
    runs = union(events.start[own], events.end[own])
    gaps = Intervals(runs.end[:-1], runs.start[1:])
    call = launched[_first_at(trace, own, gaps.end)]
    gaps, call = _chosen(gaps, call >= 0), call[call >= 0]
    ready = np.clip(events.start[call], gaps.start, gaps.end)
    first, last = activity.window
    waiting = union(np.clip(ready, first, last), np.clip(gaps.end, first, last))
    found: list[Reason] = []
    for cause, kinds in ((Cause.COMMUNICATION, [Kind.COMMUNICATION]), (Cause.STREAM, DEVICE_KINDS)):
        running = others[np.isin(events.kind[others], kinds)]
        time = intersect(waiting, union(events.start[running], events.end[running]))
        if len(time.start):
            lengths = covered(time, events.start[running], events.end[running])
            longest = int(np.bincount(events.name[running], weights=lengths).argmax())
            found.append(Reason(cause, trace.names[longest], total(*time), len(time.start)))
            waiting = subtract(waiting, time)
    return sorted(found, key=lambda reason: -reason.time)


def _chosen(intervals: Intervals, mask: np.ndarray) -> Intervals:
    return Intervals(intervals.start[mask], intervals.end[mask])
