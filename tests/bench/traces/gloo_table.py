"""Tables of ranks that work and then all_reduce, made by arithmetic: who is late, by how much, is known."""

from collections import Counter

import numpy as np

from bench.traces.events import Events, Job, Kind, Lane, Trace

MAIN, BACKEND = 0, 1
NOISE = np.random.default_rng(0)
TRANSFER = 100_000  # nanoseconds from the last arrival to the end


def even(ranks, rounds, work=5_000_000):
    """Nanoseconds of work that vary by some per cent, as those of equal ranks do."""
    return np.rint(work * (1 + 0.03 * NOISE.standard_normal((ranks, rounds)))).astype(np.int64)


def bulk_synchronous(own, *, offsets=None, drifts=None, host="", steps=True, transfer=TRANSFER, late_by=None):
    """A job whose rank r works own[r][k] ns in round k, in "work", then joins an all_reduce of 4000 bytes.

    own: int (ranks, rounds). offsets: what each rank's clock is behind; drifts: ns a ns that it is slow by.
    late_by: int (ranks, rounds), how much later than the others a rank leaves (the default 0).
    """
    own = np.asarray(own, np.int64)
    ranks, rounds = own.shape
    offsets = np.zeros(ranks, np.int64) if offsets is None else np.asarray(offsets)
    drifts = np.zeros(ranks) if drifts is None else np.asarray(drifts)
    leaves = np.zeros(own.shape, np.int64) if late_by is None else np.asarray(late_by)
    begin, arrivals, ends = np.zeros(ranks, np.int64), [], []
    for k in range(rounds):
        arrivals.append(begin + own[:, k])
        begin = arrivals[-1].max() + transfer + leaves[:, k]
        ends.append(begin)
    arrival, end = np.stack(arrivals, 1), np.stack(ends, 1)
    traces = []
    for rank in range(ranks):
        begun = np.append(0, end[rank, :-1])
        events = [(begun[k], arrival[rank, k], "work", Kind.OPERATOR, MAIN, -1) for k in range(rounds)]
        events += [
            (arrival[rank, k], end[rank, k], "gloo:all_reduce", Kind.COMMUNICATION, BACKEND, 4000)
            for k in range(rounds)
        ]
        if steps:
            events += [
                (begun[k], end[rank, k], f"ProfilerStep#{k}", Kind.STEP, MAIN, -1) for k in range(rounds)
            ]
        shown = [
            (*(int(time - offsets[rank] - drifts[rank] * time) for time in event[:2]), *event[2:])
            for event in events
        ]
        traces.append(trace_of(shown, rank, ranks, facts={"host": host} if host else {}))
    return Job("made", traces)


def trace_of(events, rank=0, world_size=1, *, groups=None, device=-1, **fields):
    """A trace of (start, end, name, kind, lane, bytes[, group[, correlation]]) in nanoseconds."""
    names = list(dict.fromkeys(event[2] for event in events))
    first = min(event[0] for event in events)
    table = Events.of(
        start=[event[0] - first for event in events],
        duration=[event[1] - event[0] for event in events],
        name=[names.index(event[2]) for event in events],
        kind=[event[3] for event in events],
        lane=[event[4] for event in events],
        bytes=[event[5] for event in events],
        group=[event[6] if len(event) > 6 else -1 for event in events],
        correlation=[event[7] if len(event) > 7 else -1 for event in events],
    )
    lanes = [Lane(f"rank {rank}", "main"), Lane(f"rank {rank}", "backend", device)]
    fields.setdefault("origin_ns", 1_700_000_000_000_000_000 + first)
    return Trace(
        f"rank{rank}.json",
        "kineto",
        table,
        names,
        lanes,
        groups=groups or [],
        rank=rank,
        world_size=world_size,
        dropped=Counter(),
        **fields,
    )
