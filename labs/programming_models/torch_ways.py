"""One torch program, run by each of torch's programming models: eager, compiled, exported, traced by FX.

All run on one thread, as numba's do and NumPy's while its products are small: the question is what a call
costs, not how many cores share it. Not so JAX, whose operations XLA cuts for the cores there are.
Compiled code goes to a cache that is empty at first, so that the first call is a compilation and not a
look-up; what a machine needs once (which instructions the compiler may use) is settled before.
"""

from __future__ import annotations

import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from labs.lab import Recorder
from labs.one_thread import OneThread
from labs.programming_models.captured import kernel, without_folders

Function = Callable[..., Any]


class Eager(OneThread):
    """``function(*arguments)`` as it is: also what is around a compiled or exported function."""

    def __init__(self, function: Function, arguments: Sequence[Any]) -> None:
        self._function, self._arguments = function, tuple(arguments)
        super().__init__(self._call)

    def _call(self) -> Any:
        return self._function(*self._arguments)


class Compiled(Eager):
    """By torch.compile: the first call compiles. At the end it records what was captured and generated, the
    number of graphs, and how long the first call took.

    around: makes the step out of the compiled function (an optimizer behind a loss, a loop around a cell).
    """

    def __init__(
        self,
        function: Function,
        arguments: Sequence[Any],
        recorder: Recorder,
        around: Callable[[Function], Function] = lambda function: function,
    ) -> None:
        import torch

        toolchain()
        self._recorder, self._graphs = recorder, Graphs("inductor")
        self._compile_s = 0.0
        self._generated: list[str] = []
        compiled = torch.compile(fresh(function), backend=self._graphs, fullgraph=True, dynamic=False)
        super().__init__(around(compiled), arguments)

    def _call(self) -> Any:
        if self._compile_s:
            return self._function(*self._arguments)
        begin = self._recorder.now()
        with own_cache() as folder:
            output = self._function(*self._arguments)
            self._compile_s = self._recorder.now() - begin
            made = sorted(folder.rglob("*.main.cpp"), key=lambda path: path.stat().st_mtime)
            self._generated = [kernel(path.read_text()) for path in made]
        return output

    def close(self) -> None:
        super().close()
        self._recorder.record("compile", self._compile_s, "s")
        self._recorder.record("graphs", self._graphs.count, "")
        self._recorder.text("captured FX graph", self._graphs.readable())
        self._recorder.record("kernels", len(self._generated), "")
        self._recorder.text("generated C++", "\n\n".join(self._generated))


class Graphs:
    """A backend of torch.compile that keeps the graphs it is given, then lets ``inner`` run them.

    inner: ``inductor``, or ``eager``, which runs a captured graph as it is: for what only concerns capturing.
    """

    def __init__(self, inner: str) -> None:
        self._inner = inner
        self.modules: list[Any] = []

    def __call__(self, module: Any, inputs: Sequence[Any]) -> Function:
        self.modules.append(module)
        if self._inner == "eager":
            return module.forward
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(module, list(inputs))

    @property
    def count(self) -> int:
        return len(self.modules)

    def readable(self) -> str:
        return "\n\n".join(readable(module) for module in self.modules)


def readable(module: Any) -> str:
    """A GraphModule as Python, with shapes."""
    return without_folders(module.print_readable(print_output=False))


def fresh(function: Function) -> Function:
    """The function with a code object of its own, of which Dynamo knows nothing.

    What it compiled, and how often, Dynamo keeps by code object; which sizes changed and so became symbols,
    by the place of the code in its file. Two ways that compile the same function would see one another's.
    """
    import torch._dynamo.pgo

    torch._dynamo.pgo.reset_code_state()
    if not isinstance(function, types.FunctionType):
        return function
    made = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def compiled_first(step: Callable[[], Any]) -> Callable[[], Any]:
    """A step with a compiled function in it, whose first call compiles and looks nothing up."""
    toolchain()

    def first() -> Any:
        with own_cache():
            return step()

    calls = iter((first,))
    return lambda: next(calls, step)()


@cache
def toolchain() -> None:
    """Import the compiler, find the widest vectors it may use (kept by torch between runs), compile once."""
    import torch
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    pick_vec_isa()
    with own_cache():
        torch.compile(lambda x: x + 1)(torch.ones(3))


@contextmanager
def own_cache() -> Iterator[Path]:
    """Inductor compiles into a folder of its own, empty at first and gone at the end; what is compiled stays
    loaded. Its caches in memory are emptied too: the same program is compiled again, not looked up."""
    from torch._inductor.utils import fresh_cache

    with tempfile.TemporaryDirectory(prefix="perflab-inductor-") as folder, fresh_cache(dir=folder):
        yield Path(folder)


def module_of(function: Function) -> Any:
    """A module that calls the function: ``torch.export`` takes modules only."""
    import torch

    class Program(torch.nn.Module):
        def forward(self, *arguments: Any) -> Any:
            return function(*arguments)

    return Program()


def exported(function: Function, arguments: Sequence[Any], recorder: Recorder) -> Eager:
    """By torch.export: one graph of ATen operations without Python, run here operation by operation."""
    import torch

    program = torch.export.export(module_of(function), tuple(arguments))
    recorder.text("exported program", readable(program.graph_module))
    return Eager(program.module(), arguments)


def traced(function: Function, arguments: Sequence[Any], recorder: Recorder) -> Eager:
    """By torch.fx.symbolic_trace: the function run once on proxies, printed as new Python code."""
    import torch

    module = torch.fx.symbolic_trace(function)
    recorder.text("FX graph as Python", module.code.strip())
    return Eager(module, arguments)


def cuda_graph(function: Function, arguments: Sequence[Any], recorder: Recorder) -> Eager:
    """Recorded once as a CUDA graph, then launched as a whole; inputs and output stay where they are."""
    import torch

    there = [argument.cuda() for argument in arguments]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # library handles and workspaces are made outside the recording
        for _ in range(3):
            function(*there)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function(*there)

    def replay() -> Any:
        graph.replay()
        return output

    return Eager(replay, ())
