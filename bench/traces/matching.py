"""Which operation of one report is which of another.

An operation is known by its place in the call tree: the operators that enclose it, outermost first, each with
the shapes of its inputs. A kernel stands where the operator that launched it stands, for kernels change their
names between vendors and versions and operators do not. What is at the same place in both reports is the
same operation. The rest is matched by less, step by step: the place without shapes, the innermost operator
that both reports share around what is left (its implementation changed), the name and shapes at another
place, the name. What no rule brings together was added or removed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bench.traces.events import Kind, Trace
from bench.traces.tree import nearest

_INSTANCE = re.compile(r"^(ProfilerStep|enumerate\(DataLoader\)|Optimizer\.\w+)#.*")
_LINE = re.compile(r"\(\d+\)(?=: )|:\d+(?=\)?$)| at 0x[0-9a-fA-F]+")


class Frame(NamedTuple):
    """One level of a place: an operator and the shapes of its inputs ('' where not recorded)."""

    name: str
    shape: str


class Key(NamedTuple):
    """what: "operation", "communication", "copy", "waiting", "function" or "idle". path: outermost first."""

    what: str
    path: tuple[Frame, ...]


@dataclass(frozen=True)
class Match:
    """Keys of both sides that are one operation; either may be empty. how: the rule that says so."""

    base: tuple[Key, ...]
    new: tuple[Key, ...]
    how: str


def stable_name(name: str) -> str:
    """A name without what differs from run to run, from edit to edit: line numbers, addresses, instances."""
    return _LINE.sub("", _INSTANCE.sub(r"\1", name))


class Places:
    """The place of each operator of a trace as a number; ``path(number)`` spells it out."""

    def __init__(self, trace: Trace, parents: np.ndarray) -> None:
        events = trace.events
        self._names = [stable_name(name) for name in trace.names]
        self._shapes = trace.shapes
        is_operator = events.kind == Kind.OPERATOR
        self.operator = nearest(is_operator, parents)
        self.number = np.full(len(events), -1, np.int64)
        self._parts: list[tuple[int, int, int]] = []
        above = np.where(parents >= 0, self.operator[np.maximum(parents, 0)], -1)
        same = {name: code for code, name in reversed(list(enumerate(self._names)))}
        name_code = np.array([same[name] for name in self._names] or [0], np.int64)
        waiting = np.flatnonzero(is_operator)
        parent = np.full(len(events), -1, np.int64)
        ready = waiting[above[waiting] < 0]
        while len(ready):  # a level of the tree at a time
            table = np.stack((parent[ready], name_code[events.name[ready]], events.shape[ready]), 1)
            unique, inverse = np.unique(table, axis=0, return_inverse=True)
            self.number[ready] = len(self._parts) + inverse.reshape(-1)
            self._parts += [tuple(part) for part in unique.tolist()]
            waiting = waiting[self.number[waiting] < 0]
            placed = self.number[above[waiting]] >= 0
            ready = waiting[placed]
            parent[ready] = self.number[above[ready]]

    def path(self, number: int) -> tuple[Frame, ...]:
        frames = []
        while number >= 0:
            number, name, shape = self._parts[number]
            frames.append(Frame(self._names[name], self._shapes[shape] if shape >= 0 else ""))
        return tuple(reversed(frames))

    def own(self, name: int) -> tuple[Frame, ...]:
        """The place of what no operator encloses: its name."""
        return (Frame(self._names[name], ""),)


def match(base: Iterable[Key], new: Iterable[Key]) -> list[Match]:
    """Every key of both sides in exactly one match."""
    left, right = list(dict.fromkeys(base)), list(dict.fromkeys(new))
    found: list[Match] = []

    def settle(how: str, rule: Callable[[Key], Hashable]) -> None:
        sides: dict[Hashable, tuple[list[Key], list[Key]]] = defaultdict(lambda: ([], []))
        for side, keys in enumerate((left, right)):
            for key in keys:
                if (value := rule(key)) is not None:
                    sides[value][side].append(key)
        done: set[Key] = set()
        for before, after in sides.values():
            if before and after:
                found.append(Match(tuple(before), tuple(after), how))
                done.update(before, after)
        left[:] = [key for key in left if key not in done]
        right[:] = [key for key in right if key not in done]

    settle("same place", lambda key: key)
    settle("other shapes", lambda key: (key.what, tuple(frame.name for frame in key.path)))
    deepest = max((len(key.path) for key in left + right), default=0)
    for depth in range(deepest - 1, 0, -1):
        settle("other implementation", lambda key, depth=depth: _around(key, depth))  # type: ignore[misc]
    settle("other place", lambda key: (key.what, key.path[-1]))
    settle("other place and shapes", lambda key: (key.what, key.path[-1].name))
    found += [Match((key,), (), "removed") for key in left] + [Match((), (key,), "added") for key in right]
    return found


def _around(key: Key, depth: int) -> Hashable:
    """The outermost ``depth`` operators around an operation, without shapes; None where there are fewer."""
    if len(key.path) < depth:
        return None
    return key.what, tuple(frame.name for frame in key.path[:depth])
