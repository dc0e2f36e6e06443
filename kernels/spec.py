"""What an operation is, once: its reference, its shapes, what it moves. Tests, benchmarks and labs read it.

Each family's ``spec.py`` lists its operations in ``OPERATIONS`` and may list further ``BENCHMARKS`` and
``SIZED``; ``operations()``, ``benchmarks()`` and ``sized()`` gather them.
``tests/kernels/test_operations.py`` holds every operation to its float64 reference on every case;
``bench/suites/test_kernels.py`` times every benchmark beside its peers, ``bench/suites/test_crossover.py``
small sizes beside torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

NEVER = 2**62
"""A crossover that no tensor reaches."""
FAMILIES = ("activation", "attention", "loss", "matmul", "normalization", "optimizer", "rotary")

Arguments = dict[str, Any]
"""Keyword arguments of the public function; tensors among them."""

Step = Callable[[], object]
Peer = Callable[[Arguments, str], Step | None]
"""(arguments, direction) -> the step to time, prepared as that peer likes it best; None where it has none."""


@dataclass(frozen=True)
class Case:
    """Arguments of one size. ``make(dtype, generator)`` builds them on the CPU, with random values."""

    label: str
    make: Callable[[torch.dtype, torch.Generator], Arguments]

    def arguments(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Arguments:
        """The same values for the same seed, on any device."""
        made = self.make(dtype, torch.Generator().manual_seed(seed))
        return {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in made.items()
        }


@dataclass(frozen=True)
class Benchmark:
    """One line of the table of speeds.

    operation: the public function. direction: ``forward``, ``backward`` or ``forward+backward``.
    ways(device): builds the steps that do the same work, ours as ``kernels``, the others by the peer's name.
    bytes_moved: what must cross memory at least, each tensor once. rewritten: so many tensors are read and
    written where they lie, beside one that is read (0: as much is read as is written elsewhere). flops: of
    its products, else 0. holds_less: to hold less memory is what it is for. target: the least speed-up over
    the best peer that the project aims at on a CPU, None where it has promised none.
    """

    operation: str
    direction: str
    label: str
    dtype: torch.dtype
    ways: Callable[[str], Mapping[str, Step]]
    bytes_moved: int
    flops: int = 0
    target: float | None = None
    rewritten: int = 0
    holds_less: bool = False

    @property
    def name(self) -> str:
        return f"{self.operation} {self.direction} {self.label} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Sized:
    """An operation at any size: where do our kernels begin to beat torch's own operation?

    ways(rows, columns, device): the elements that decide (see ``kernels.op.use_torch``), and the steps, ours
    and torch's. columns: the width at which the rows are counted. most: what the crossover may be at most,
    for operations that are there to hold less memory.
    """

    operation: str
    ways: Callable[[int, int, str], tuple[int, Step, Step]]
    columns: int = 1024
    most: int = NEVER


def _no_flops(arguments: Arguments, backward: bool) -> int:
    return 0


@dataclass(frozen=True)
class Operation:
    """One public function of ``kernels``.

    name: of the function. function: it. reference: the same, in plain torch, right in float64. eager: torch's
    own best eager way with the same arguments, the yardstick of accuracy and the first peer in speed.
    gradients: names of the arguments that take one. cases: small and awkward sizes for the tests; the second
    is the one that stands for all. sizes: those worth timing, in float32. bytes_moved(arguments, backward)
    and flops(arguments, backward): see ``Benchmark``. targets: ``{direction: target}``, one line of the table
    each.
    peers: further ways to do the same. dtypes: what the kernels take. sized(rows, columns): the case of that
    size, on which the crossover to torch is measured (see ``Sized``), at ``columns`` columns; None where the
    kernels run at every size. counted(arguments): the elements that decide; None: the first tensor's.
    measured_as: under which name, where an option makes another operation of it.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    eager: Callable[..., Any]
    cases: Sequence[Case]
    sizes: Sequence[Case]
    bytes_moved: Callable[[Arguments, bool], int]
    gradients: tuple[str, ...] = ()
    flops: Callable[[Arguments, bool], int] = _no_flops
    peers: Mapping[str, Peer] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    targets: Mapping[str, float | None] = field(default_factory=lambda: {"forward": None})
    sized: Callable[[int, int], Case] | None = None
    counted: Callable[[Arguments], int] | None = None
    columns: int = 1024
    most: int = NEVER
    measured_as: str = ""

    def sizes_of(self) -> Iterator[Sized]:
        """How to run it at any size, if it can be."""
        make = self.sized
        if make is None:
            return

        def ways(rows: int, columns: int, device: str) -> tuple[int, Step, Step]:
            arguments = make(rows, columns).arguments(torch.float32, device)
            tensors = (value for value in arguments.values() if isinstance(value, torch.Tensor))
            elements = self.counted(arguments) if self.counted else next(tensors).numel()
            ours, theirs = (
                step_of(function, arguments, (), "forward") for function in (self.function, self.eager)
            )
            return elements, ours, theirs

        yield Sized(self.measured_as or self.name, ways, self.columns, self.most)

    def benchmarks(self, dtype: torch.dtype = torch.float32, aimed: bool = False) -> Iterator[Benchmark]:
        """A line for each size and direction; ``aimed``: for each that has a target."""
        targets = {name: target for name, target in self.targets.items() if target is not None or not aimed}
        for case in self.sizes if targets else ():
            shapes = {
                name: value.to("meta") if isinstance(value, torch.Tensor) else value
                for name, value in case.arguments(dtype).items()
            }
            for direction, target in targets.items():
                parts = [part == "backward" for part in direction.split("+")]
                yield Benchmark(
                    self.name,
                    direction,
                    case.label,
                    dtype,
                    self._ways(case, dtype, direction),
                    sum(self.bytes_moved(shapes, part) for part in parts),
                    sum(self.flops(shapes, part) for part in parts),
                    target,
                    holds_less=self.most != NEVER,
                )

    def _ways(self, case: Case, dtype: torch.dtype, direction: str) -> Callable[[str], dict[str, Step]]:
        def ways(device: str) -> dict[str, Step]:
            arguments = case.arguments(dtype, device)
            found = {
                "kernels": step_of(self.function, arguments, self.gradients, direction),
                "torch": step_of(self.eager, arguments, self.gradients, direction),
                "torch.compile": step_of(torch.compile(self.eager), arguments, self.gradients, direction),
            }
            for label, peer in self.peers.items():
                try:
                    step = peer(arguments, direction)
                except ImportError:  # a peer that is not installed does not compete
                    continue
                if step is not None:
                    found[label] = step
            return found

        return ways


def step_of(
    function: Callable[..., Any], arguments: Arguments, gradients: Sequence[str], direction: str
) -> Step:
    """The step that runs ``function`` forward, backward (of a graph made once), or both."""
    arguments = dict(arguments)
    if direction == "forward":

        def forward() -> object:
            with torch.no_grad():
                return function(**arguments)

        return forward
    inputs = []
    for name in gradients:
        if isinstance(arguments.get(name), torch.Tensor):
            arguments[name] = arguments[name].detach().requires_grad_()
            inputs.append(arguments[name])

    def flat(outputs: Any) -> tuple[torch.Tensor, ...]:
        return outputs if isinstance(outputs, tuple) else (outputs,)

    outputs = flat(function(**arguments))
    weights = [torch.randn_like(out) if out.dim() else torch.ones_like(out) for out in outputs]
    if direction == "backward":
        return lambda: torch.autograd.grad(outputs, inputs, weights, retain_graph=True)
    if direction != "forward+backward":
        raise ValueError(f"direction is forward, backward or forward+backward, not {direction!r}")
    return lambda: torch.autograd.grad(flat(function(**arguments)), inputs, weights)


def _specs() -> list[ModuleType]:
    return [importlib.import_module(f"kernels.{family}.spec") for family in FAMILIES]


def operations() -> list[Operation]:
    """Every operation of every family."""
    return [operation for spec in _specs() for operation in getattr(spec, "OPERATIONS", ())]


def benchmarks(aimed: bool = False) -> list[Benchmark]:
    """Every line of the table of speeds; ``aimed``: every line that has a target."""
    return [
        line
        for spec in _specs()
        for group in (
            *(operation.benchmarks(aimed=aimed) for operation in getattr(spec, "OPERATIONS", ())),
            getattr(spec, "BENCHMARKS", ()),
        )
        for line in group
        if line.target is not None or not aimed
    ]


def sized() -> list[Sized]:
    """Every operation that can be run at any size."""
    return [
        one
        for spec in _specs()
        for group in (
            *(operation.sizes_of() for operation in getattr(spec, "OPERATIONS", ())),
            getattr(spec, "SIZED", ()),
        )
        for one in group
    ]


def tensor_bytes(*tensors: torch.Tensor | None) -> int:
    """Bytes that the elements of these tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
