"""Four programs that part the ways: a branch on a value, a side effect, a shape that depends on values, and
many shapes one after the other.

Each way runs each program once. It gives the reference's values, or an error, told in a sentence of
``refusals.py``. Counted are refusals, side effects that happened, and graphs: each is a compilation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

from labs.lab import Recorder, Step
from labs.programming_models import torch_ways
from labs.programming_models.config import Config
from labs.programming_models.refusals import Refused, refusal

Inputs = Sequence[Any]
RECOMPILE_LIMIT = 8  # torch._dynamo.config.recompile_limit; held to it while the lab runs


# --- the programs: the same text for NumPy, torch and JAX ----------------------------------------------


def branch(x: Any) -> Any:
    if x.sum() > 0:
        return x * 2
    return x - 1


def selection(x: Any) -> Any:
    return x[x > 0]


def twice(x: Any) -> Any:
    return x * 2 + 1


EFFECTS: list[int] = []


def noted(x: Any) -> Any:
    EFFECTS.append(1)
    return x * 2


PROGRAMS: Mapping[str, Callable[[Any], Any]] = {
    "branch": branch,
    "side_effect": noted,
    "selection": selection,
    "new_shapes": twice,
}


def inputs(config: Config, program: str) -> list[Any]:
    """What the program is called with, one after the other: float32 arrays."""
    import numpy

    if program == "new_shapes":
        return [numpy.linspace(-1, 1, 3 + 2 * index, dtype=numpy.float32) for index in range(config.shapes)]
    x = numpy.asarray([1.5, -0.25, 2.0, -1.0], numpy.float32)
    return [x, -x] if program == "branch" else [x, 3 * x, -x] if program == "side_effect" else [x]


# --- the ways ------------------------------------------------------------------------------------------

TORCH = ("torch", "torch_compile", "torch_fullgraph", "torch_static", "torch_dynamic", "torch_export", "fx")
JAX = ("jax", "jax_jit", "jax_padded")


def _torch(program: str, way: str, recorder: Recorder, example: Any) -> Callable[[Any], Any]:
    import torch

    function = torch_ways.fresh(PROGRAMS[program])
    if program == "branch" and way.endswith("_cond"):
        function = _torch_cond
    if way == "torch":
        return function
    if way == "fx":
        return torch.fx.symbolic_trace(function)
    if way.startswith("torch_export"):
        shapes = {"arguments": ({0: torch.export.Dim.DYNAMIC},)} if way == "torch_export_dynamic" else None
        module = torch_ways.module_of(function)
        return torch.export.export(module, (example,), dynamic_shapes=shapes).module()
    graphs = torch_ways.Graphs("eager")
    dynamic = {"torch_static": False, "torch_dynamic": True}.get(way)
    compiled = torch.compile(
        function, backend=graphs, dynamic=dynamic, fullgraph=way in ("torch_fullgraph", "torch_cond")
    )

    def counted(x: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            output = compiled(x)
        recorder.record("graphs", graphs.count, "")
        if program == "side_effect" and graphs.count > 1:
            recorder.text(
                "compiled again",
                f"{way}: {graphs.count} programs for {len(EFFECTS)} calls. What was captured is "
                "guarded by the "
                "length of the list, which each call changes. Instead: return what should be kept.",
            )
        return output

    return counted


def _torch_cond(x: Any) -> Any:
    import torch

    return torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x - 1, (x,))


def _jax(program: str, way: str, recorder: Recorder) -> Callable[[Any], Any]:
    import jax
    import numpy

    function = _jax_cond if way == "jax_cond" else PROGRAMS[program]
    if way == "jax":
        return function
    traces = 0

    def counted(x: Any) -> Any:
        nonlocal traces
        traces += 1
        return function(x)

    jitted = jax.jit(counted)

    def run(x: Any) -> Any:
        if way == "jax_padded":
            # To the next power of two: few shapes, and the rest is cut off again. By NumPy, since jnp.pad and
            # the cut would themselves be compiled for each shape.
            room = 1 << (x.size - 1).bit_length()
            padded = numpy.pad(numpy.asarray(x), (0, room - x.size))
            output = numpy.asarray(jitted(padded))[: x.size]
        else:
            output = jitted(x)
        recorder.record("graphs", traces, "")
        return output

    return run


def _jax_cond(x: Any) -> Any:
    import jax

    return jax.lax.cond(x.sum() > 0, lambda x: x * 2, lambda x: x - 1, x)


def _numba(program: str, recorder: Recorder) -> Callable[[Any], Any]:
    import numba

    compiled = numba.njit(PROGRAMS[program])

    def run(x: Any) -> Any:
        output = compiled(x)
        recorder.record("graphs", len(compiled.signatures), "")
        return output

    return run


WAYS: Mapping[str, tuple[str, ...]] = {
    "branch": (
        "torch", "torch_compile", "torch_fullgraph", "torch_cond", "torch_export", "torch_export_cond", "fx",
        "jax", "jax_jit", "jax_cond", "numpy", "numba",
    ),
    "side_effect": ("torch", "torch_compile", "torch_export", "fx", "jax", "jax_jit", "numpy", "numba"),
    "selection": ("torch", "torch_compile", "torch_export", "jax", "jax_jit", "numpy", "numba"),
    "new_shapes": (
        "torch", "torch_compile", "torch_static", "torch_dynamic", "torch_export", "torch_export_dynamic",
        "jax_jit", "jax_padded", "numba",
    ),
}  # fmt: skip


def setup(program: str, way: str, config: Config, recorder: Recorder) -> Step:
    """A step that makes and runs the way; it returns arrays, or the Refused that it got instead."""

    def step() -> list[Any] | Refused:
        import numpy

        EFFECTS.clear()
        there = inputs(config, program)
        said = StringIO()  # some frameworks print the graph they gave up on
        try:
            with redirect_stdout(said), redirect_stderr(said):
                if way.startswith("torch") or way == "fx":
                    import torch

                    there = [torch.from_numpy(x.copy()) for x in there]
                    run = _torch(program, way, recorder, there[0])
                elif way.startswith("jax"):
                    import jax.numpy as jnp

                    there = [jnp.asarray(x) for x in there]
                    run = _jax(program, way, recorder)
                else:
                    run = _numba(program, recorder) if way == "numba" else PROGRAMS[program]
                outputs = [numpy.asarray(run(x)) for x in there]
        except Exception as error:
            refused = refusal(way, error)
            recorder.record("refused", 1.0, "")
            recorder.text("refused", str(refused))
            return refused
        recorder.record("refused", 0.0, "")
        if program == "side_effect":
            recorder.record("effects", len(EFFECTS), "")
            if len(EFFECTS) < len(there):
                recorder.text(
                    "silently different",
                    f"{way}: the list grew {len(EFFECTS)} times in {len(there)} calls. Python runs while the "
                    "program is captured, not when it is called. Instead: return what should be kept"
                    + (", or use jax.debug.callback." if way.startswith("jax") else "."),
                )
        if program == "branch" and way == "torch_compile":
            recorder.text("graph breaks and their reasons", break_reasons(branch, there[0]))
        return outputs

    return step


def break_reasons(function: Callable[[Any], Any], x: Any) -> str:
    """Where torch.compile leaves its graph in ``function(x)``, and why: a line each."""
    import torch

    found = torch._dynamo.explain(torch_ways.fresh(function))(x)
    lines = [f"{found.graph_count} graphs, {found.graph_break_count} breaks on the way of this input"]
    for reason in found.break_reasons:
        frame = reason.user_stack[-1] if reason.user_stack else None
        where = f", at `{frame.line}` (line {frame.lineno} of {frame.name})" if frame and frame.line else ""
        said = " ".join(str(reason.reason).split())
        if said.startswith("generic_jump"):
            said = f"Python branches on the value of a tensor ({said})"
        lines.append(f"break: {said[:400]}{where}")
    lines += [torch_ways.readable(module) for module in found.graphs]
    return "\n".join(lines)


def reference(config: Config, program: str) -> list[Any]:
    """What the program is in NumPy, float64."""
    EFFECTS.clear()
    return [PROGRAMS[program](x.astype("float64")) for x in inputs(config, program)]
