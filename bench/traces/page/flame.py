"""Call trees for flame graphs: the slices of a job merged by their path of names, host and device in one.

A node is one path: every ``aten::linear`` called from the same ``forward`` called from the same step is one
node, whatever its thread or rank. Kernels hang under the call that launched them: one tree shows where the
host spends its time and, weighed by device time, which call paths keep the device busy. Steps are one
node (``ProfilerStep#7`` and ``#8`` are the same work).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.report.units import text_of
from bench.traces.events import DEVICE_KINDS, Kind, Trace
from bench.traces.page.packing import EXACT, Words, pack
from bench.traces.tree import enclosing, launched_by, self_time

MOST_NODES = 12_000  # on one page; what is smaller is put together and counted
UNLAUNCHED = "(no launching call in the report)"
_DEEPEST = 500  # nodes of a path; a canvas is at most 32,767 pixels high


@dataclass
class CallTree:
    """Nodes in an order in which a parent stands before its children.

    parent: number of the parent, -1 at the top. name: what the node is called. kind: its ``Kind``.
    host, device: nanoseconds a node itself takes, without its children. calls: slices merged into it.
    too_deep: slices that are in no node.
    """

    parent: list[int] = field(default_factory=list)
    name: list[str] = field(default_factory=list)
    kind: list[int] = field(default_factory=list)
    host: list[int] = field(default_factory=list)
    device: list[int] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    too_deep: int = 0
    _known: dict[tuple[int, str], int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.parent)

    def node(self, parent: int, name: str, kind: int) -> int:
        """The child of that name, made if there is none yet."""
        number = self._known.setdefault((parent, name), len(self.parent))
        if number == len(self.parent):
            self.parent.append(parent)
            self.name.append(name)
            self.kind.append(kind)
            for column in (self.host, self.device, self.calls):
                column.append(0)
        return number

    def path(self, number: int) -> list[str]:
        """The names from the top to this node."""
        names = []
        while number >= 0:
            names.append(self.name[number])
            number = self.parent[number]
        return names[::-1]

    def totals(self, own: Sequence[int]) -> np.ndarray:
        """int64 (nodes,): what a node and all below it take."""
        total = np.asarray(own, np.int64).tolist()
        for number in range(len(total) - 1, -1, -1):
            if self.parent[number] >= 0:
                total[self.parent[number]] += total[number]
        return np.asarray(total, np.int64)


def call_tree(traces: Sequence[Trace]) -> CallTree:
    """The call tree of all slices of these traces."""
    tree = CallTree()
    for trace in traces:
        _add(tree, trace)
    return tree


def _add(tree: CallTree, trace: Trace) -> None:
    events = trace.events
    above = enclosing(trace)
    on_device = trace.on_device()
    own = np.where(on_device, events.duration, self_time(events, above))
    # On a device only what computes or moves bytes counts: its annotations repeat the host's.
    works = np.isin(events.kind, (*DEVICE_KINDS, Kind.COMMUNICATION))
    counted = ~on_device | works
    above = np.where(on_device, launched_by(events), above)
    names = [_merged(name) for name in trace.names]
    # A step may be marked as a STEP on one lane and as an ANNOTATION on another; each name is one node.
    codes = {name: code for code, name in enumerate(dict.fromkeys(names))}
    code = np.array([codes[name] for name in names] or [0], np.int64)[events.name]
    plain = list(codes)
    node = np.full(len(events) + 1, -1, np.int64)  # the last one is for -1: what is above the top
    left = np.flatnonzero(counted)
    for _ in range(_DEEPEST):
        ready = left[(above[left] < 0) | (node[above[left]] >= 0)]
        if not len(ready):
            break
        key = (node[above[ready]] + 1) * (len(plain) + 1) + code[ready]
        orphan = on_device[ready] & (above[ready] < 0)
        key = np.where(orphan, -1 - code[ready], key)
        _, first, group = np.unique(key, return_index=True, return_inverse=True)
        host = np.bincount(group, np.where(on_device[ready], 0, own[ready]))
        device = np.bincount(group, np.where(on_device[ready], own[ready], 0))
        calls = np.bincount(group, events.calls[ready])
        numbers = np.empty(len(first), np.int64)
        for i, row in enumerate(ready[first].tolist()):
            parent = int(node[above[row]])
            if on_device[row] and parent < 0:
                parent = tree.node(-1, UNLAUNCHED, int(Kind.UNCLASSIFIED))
            number = tree.node(parent, plain[code[row]], int(events.kind[row]))
            numbers[i] = number
            tree.host[number] += int(host[i])
            tree.device[number] += int(device[i])
            tree.calls[number] += int(calls[i])
        node[ready] = numbers[group]
        left = left[node[left] < 0]
    tree.too_deep += len(left)


def _merged(name: str) -> str:
    """Names of the same work: the number of a step is not part of it."""
    return re.sub(r"^(ProfilerStep|step|iteration|train|eval)\s?#?\s?\d+$", r"\1", name, flags=re.IGNORECASE)


@dataclass(frozen=True)
class Flame:
    """What the script draws, and how many nodes were too small to be nodes of their own."""

    data: dict[str, Any]
    nodes: int
    merged: int


def flame(tree: CallTree, words: Words, most: int = MOST_NODES, unit: str = "") -> Flame:
    """One tree for the page, weighed by host or by device time. unit: as of ``Trace``."""
    weights = {"host": np.asarray(tree.host, np.int64), "device": np.asarray(tree.device, np.int64)}
    return _flame(tree, weights, words, most, unit)


@dataclass(frozen=True)
class Overlay:
    """Two trees laid over one another by path.

    weights: int64 (nodes,) nanoseconds a step that a node itself takes: base_host, new_host, base_device,
    new_device.
    """

    tree: CallTree
    weights: dict[str, np.ndarray]


def overlay(base: CallTree, new: CallTree, steps: tuple[int, int]) -> Overlay:
    """Both trees as one; steps: over how many steps the slices of each are spread."""
    both = CallTree(too_deep=base.too_deep + new.too_deep)
    places: list[np.ndarray] = []
    for tree in (base, new):
        place: list[int] = []
        for number, parent in enumerate(tree.parent):
            above = place[parent] if parent >= 0 else -1
            place.append(both.node(above, tree.name[number], tree.kind[number]))
            both.calls[place[-1]] += tree.calls[number]
        places.append(np.asarray(place, np.int64))
    weights: dict[str, np.ndarray] = {}
    for kind in ("host", "device"):
        for side, tree, nodes, count in zip(("base", "new"), (base, new), places, steps, strict=True):
            column = np.zeros(len(both), np.int64)
            column[nodes] = np.rint(np.asarray(getattr(tree, kind), np.float64) / max(1, count))
            weights[f"{side}_{kind}"] = column
    return Overlay(both, weights)


def difference_flame(both: Overlay, words: Words, most: int = MOST_NODES) -> Flame:
    """Two trees as one for the page."""
    return _flame(both.tree, both.weights, words, most)


def _flame(tree: CallTree, weights: dict[str, np.ndarray], words: Words, most: int, unit: str = "") -> Flame:
    kept = _largest(tree, weights, most)
    place = np.cumsum(kept) - 1
    parent, name, kind, calls = [], [], [], []
    own: dict[str, list[int]] = {weight: [] for weight in weights}
    small: dict[int, list[int]] = {}  # of the nodes too small: the nearest parent that is kept -> its nodes
    for number in range(len(tree)):
        above = tree.parent[number]
        if not kept[number]:
            while above >= 0 and not kept[above]:
                above = tree.parent[above]
            small.setdefault(above, []).append(number)
            continue
        parent.append(place[above] + 1 if above >= 0 else 0)
        name.append(words.number(tree.name[number]))
        kind.append(tree.kind[number])
        calls.append(tree.calls[number])
        for weight, values in weights.items():
            own[weight].append(int(values[number]))
    for above, members in small.items():
        parent.append(place[above] + 1 if above >= 0 else 0)
        name.append(words.number(f"({len(members):,} smaller)"))
        kind.append(int(Kind.UNCLASSIFIED))
        calls.append(sum(tree.calls[number] for number in members))
        for weight, values in weights.items():
            own[weight].append(int(values[members].sum()))
    columns = {"parent": parent, "name": name, "kind": kind, "calls": calls, **own}
    data = {
        "kinds": [item.name.lower() for item in Kind],
        "weights": [weight for weight, values in own.items() if any(values)],
        "unit": text_of(unit, 20),
        **{key: pack(np.clip(np.asarray(values, np.int64), 0, EXACT)) for key, values in columns.items()},
    }
    return Flame(data, len(parent), len(tree) - int(kept.sum()))


def _largest(tree: CallTree, weights: dict[str, np.ndarray], most: int) -> np.ndarray:
    """Mask of the nodes with the largest share of any weight; a parent's share is at least its child's."""
    share = np.zeros(len(tree))
    for values in weights.values():
        total = tree.totals(values.tolist())
        share = np.maximum(share, total / max(1, int(values.sum())))
    kept = np.zeros(len(tree), bool)
    kept[np.argsort(-share, kind="stable")[:most]] = True
    return kept
