"""The two halves of a backward apart, and neither computed twice: first the gradients of what went in, later
those of the weights (Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 2).

Asking autograd twice, once for the inputs and once for the weights, does the chain of input gradients twice.
So the graph of a forward is looked at once. An operation that has both an input's gradient and a weight's to
give is a *fork*. The first half runs the chain from the outputs to the inputs and keeps what arrives at each
fork; the second half starts at the forks, and goes to the weights only.

What cannot wait is computed in the first half, once, and counted in ``Split.early``:

- a weight that several operations of the stage use: from one of them autograd would go on to the other;
- a weight of a ``torch.autograd.Function``, which does all it can whenever it is asked. Those that look at
  ``ctx.needs_input_grad`` can be split; ``SPLITTABLE`` names them, the operations of ``kernels`` among them.

Where nothing that goes in has a gradient (tokens), what the first modules make of it stands in for it
(``Sources``): the chain ends at the embeddings, whose weights belong to the second half.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge

AccumulateGrad = torch._C._functions.AccumulateGrad
SPLITTABLE = ("GeneratedBackwardFor_perflab_",)
"""Beginnings of the names of ``torch.autograd.Function`` backwards that compute only what
``ctx.needs_input_grad`` asks for, and read it in backward. The first is ``kernels``'."""


class Sources:
    """Notes where gradients begin in a module whose inputs have none: the outputs of the first modules."""

    def __init__(self, module: nn.Module) -> None:
        self.edges: list[GradientEdge] = []
        leaves = [part for part in module.modules() if next(part.children(), None) is None]
        for leaf in leaves if leaves != [module] else []:
            leaf.register_forward_hook(self._note)

    def _note(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if (
            isinstance(output, torch.Tensor)
            and output.grad_fn is not None
            and not any(isinstance(value, torch.Tensor) and value.requires_grad for value in inputs)
        ):
            self.edges.append(get_gradient_edge(output))

    def take(self) -> list[GradientEdge]:
        """Those of the forward that has just run."""
        edges, self.edges = self.edges, []
        return edges


class _Fork:
    """An operation where the way to weights leaves the way to the inputs.

    ways: a way out of ``node`` each, as (whether it leads to a source, the weights it leads to otherwise).
    """

    def __init__(self, node: Any, ways: list[tuple[bool, list[torch.Tensor]]]) -> None:
        self.node, self._ways = node, ways
        self.edges = [GradientEdge(node, number) for number in range(len(node._input_metadata))]
        self.gradients: Sequence[torch.Tensor | None] = ()  # that arrive at the edges
        self.weights = [weight for _, weights in ways for weight in weights]
        self.late: list[torch.Tensor] = []  # weights of the second half
        self._needs = tuple(node.needs_input_grad) if self.chooses else ()

    @property
    def chooses(self) -> bool:
        """Whether its halves are chosen by hand: autograd tells operations of its own what is needed."""
        return isinstance(self.node, BackwardCFunction) and self.node.name().startswith(SPLITTABLE)

    @property
    def is_whole(self) -> bool:
        """Whether it computes all of its gradients, whatever is asked for."""
        return isinstance(self.node, BackwardCFunction) and not self.chooses

    def choose(self, second_half: bool) -> None:
        """Before each half: what the operation is to compute in it."""
        if not self.chooses:
            return
        late = {id(weight) for weight in self.late}
        wanted = iter(
            any(id(weight) in late for weight in weights)
            if second_half
            else leads or any(id(weight) not in late for weight in weights)
            for leads, weights in self._ways
        )
        self.node.needs_input_grad = tuple(needed and next(wanted) for needed in self._needs)


class Split:
    """Backward of one forward. Call ``inputs`` once, then ``weights`` once.

    roots: of outputs that require a gradient. sources: where the chain of input gradients ends.
    early: weights whose gradients come with the first half.
    """

    def __init__(self, roots: Sequence[GradientEdge], sources: Sequence[GradientEdge]) -> None:
        self._roots, self._sources = roots, list(sources)
        self._forks = _forks(roots, self._sources)
        uses = Counter(id(weight) for fork in self._forks for weight in set(fork.weights))
        ends = {edge.node for edge in self._sources}
        early: dict[int, torch.Tensor] = {}
        for fork in self._forks:
            for weight in dict.fromkeys(fork.weights):
                if uses[id(weight)] > 1 or (fork.is_whole and fork.node not in ends):
                    early[id(weight)] = weight
                else:
                    fork.late.append(weight)
        self.early = list(early.values())

    def inputs(self, gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """The gradient of each source, from those of the roots. Early weights get theirs."""
        late = [fork for fork in self._forks if fork.late]
        for fork in late:
            fork.choose(second_half=False)
        wanted = [*self._sources, *map(get_gradient_edge, self.early), *(e for f in late for e in f.edges)]
        if not wanted:
            return []
        found = list(
            torch.autograd.grad(self._roots, wanted, gradients, retain_graph=bool(late), allow_unused=True)
        )
        of_sources, found = found[: len(self._sources)], found[len(self._sources) :]
        early = [
            (weight, gradient)
            for weight, gradient in zip(self.early, found, strict=False)
            if gradient is not None
        ]
        if early:  # through autograd, so that hooks of parameters run
            torch.autograd.backward(*zip(*early, strict=True))
        at = len(self.early)
        for fork in late:
            fork.gradients, at = found[at : at + len(fork.edges)], at + len(fork.edges)
        self._forks, self._roots = late, ()
        return of_sources

    def weights(self) -> None:
        """Accumulate the gradients of the other weights in their ``grad``."""
        for fork in self._forks:
            fork.choose(second_half=True)
            arrived = [(e, g) for e, g in zip(fork.edges, fork.gradients, strict=True) if g is not None]
            if arrived:
                torch.autograd.backward(*zip(*arrived, strict=True), inputs=fork.late)
        self._forks = []


def _forks(roots: Sequence[GradientEdge], sources: list[GradientEdge]) -> list[_Fork]:
    """The forks of the graph above ``roots``. Sources that are no tensors without graph count as forks, all
    of whose ways lead to weights; outputs that depend on weights only are added to the sources."""
    leads: dict[Any, bool] = {edge.node: True for edge in sources}  # whether a node leads to a source
    order = []
    stack = [(edge.node, False) for edge in roots]
    while stack:
        node, is_done = stack.pop()
        above = [one for one, _ in node.next_functions if one is not None]
        if is_done:
            leads[node] = any(leads[one] for one in above)
            order.append(node)
        elif node not in leads:
            leads[node] = False
            stack.append((node, True))
            stack.extend((one, False) for one in above)
    sources += [edge for edge in roots if not leads[edge.node]]
    ends = {edge.node for edge in sources}
    forks = []
    for node in [*(one for one in order if leads[one]), *ends]:
        if isinstance(node, AccumulateGrad):
            continue
        ways = []
        for above, _ in node.next_functions:
            if above is not None:
                on_way = node not in ends and leads[above]
                ways.append((on_way, [] if on_way else _weights_above(above)))
        if not all(on_way for on_way, _ in ways):
            forks.append(_Fork(node, ways))
    return forks


def _weights_above(start: Any) -> list[torch.Tensor]:
    """The tensors in whose ``grad`` is accumulated what goes into this node."""
    found, seen, stack = [], {start}, [start]
    while stack:
        node = stack.pop()
        if isinstance(node, AccumulateGrad):
            found.append(node.variable)
        for above, _ in node.next_functions:
            if above is not None and above not in seen:
                seen.add(above)
                stack.append(above)
    return found
