"""What the lab teaches, each sentence decided by what was measured or counted."""

from __future__ import annotations

from labs.lab import Claim, Interval, Results, all_of, at_least, values_of
from labs.programming_models.expected import expected
from labs.programming_models.payback import breakeven

SMALL = "chain_256"


def _largest(results: Results) -> str:
    return f"chain_{results.config.elements}"


def _faster(results: Results, group: str, fast: str, slow: str, bound: float) -> bool | None:
    """Whether ``fast`` takes at most 1/bound of ``slow``'s time."""
    left, right = f"{group}/{fast}", f"{group}/{slow}"
    return at_least(results.ratio(right, left), bound) if results.has(left, right) else None


def fusing_pays_past_the_cache(results: Results) -> bool | None:
    group = _largest(results)
    pairs = (("torch_compile", "torch"), ("jax_jit", "jax"), ("numba", "numpy"))
    return all_of(*(_faster(results, group, fast, slow, 2.0) for fast, slow in pairs))


def capturing_is_not_fusing(results: Results) -> bool | None:
    group = _largest(results)
    ways = [f"{group}/{name}" for name in ("torch_export", "fx")]
    if not results.has(f"{group}/torch", *ways):
        return None
    return all_of(*(at_least(results.ratio(way, f"{group}/torch"), 1 / 1.5) for way in ways))


def entering_costs(results: Results) -> bool | None:
    return _faster(results, SMALL, "numpy", "torch_compile", 1.1)


def a_compiled_call_is_nothing(results: Results) -> bool | None:
    return all_of(*(_faster(results, SMALL, "numba", eager, 3.0) for eager in ("numpy", "torch", "jax")))


def step_in_one_call(results: Results) -> bool | None:
    return _faster(results, "training_step", "jax_jit", "jax", 5.0)


def loop_inside(results: Results) -> bool | None:
    return _faster(results, "rnn_loop", "jax_scan", "jax", 5.0)


def scan_compiles_once(results: Results) -> bool | None:
    both = [values_of(results, f"rnn_loop/{way}", "compile_s") for way in ("jax_jit", "jax_scan")]
    if not all(both):
        return None
    unrolled, scan = map(Interval.of_few, both)
    return at_least(unrolled.over(scan), 1.2)


def cold_says_the_opposite(results: Results) -> bool | None:
    group = _largest(results)
    eager, compiled = f"{group}/torch", f"{group}/torch_compile"
    if not results.has(eager, compiled):
        return None
    cold = results.cold_seconds(compiled) / results.cold_seconds(eager)
    return all_of(cold >= 10, _faster(results, group, "torch_compile", "torch", 1.0))


def small_work_never_pays(results: Results) -> bool | None:
    calls = breakeven(results, 256, "torch_compile")
    return at_least(calls, 1000.0) if calls is not None else None


def shapes_are_compiled(results: Results) -> bool | None:
    """jit for each shape; torch.compile twice; numba and dynamic=True once."""
    return _as_expected(results, "new_shapes", "graphs", "jax_jit", "torch_compile", "torch_dynamic", "numba")


def branches(results: Results) -> bool | None:
    refuse, take = ("jax_jit", "torch_export", "torch_fullgraph", "fx"), ("torch", "jax", "numpy", "numba")
    return all_of(
        _as_expected(results, "branch", "refused", *refuse, *take, "torch_compile"),
        _as_expected(results, "branch", "graphs", "torch_compile"),
    )


def remedies(results: Results) -> bool | None:
    return _as_expected(results, "branch", "refused", "jax_cond", "torch_cond", "torch_export_cond")


def effects_are_lost(results: Results) -> bool | None:
    ways = ("torch", "torch_compile", "jax_jit", "fx", "torch_export")
    return _as_expected(results, "side_effect", "effects", *ways)


def _as_expected(results: Results, program: str, key: str, *ways: str) -> bool | None:
    """Whether each way counted what was predicted of it (``expected.py``)."""
    wanted = expected(results.config)
    verdicts = []
    for way in ways:
        found = values_of(results, f"{program}/{way}", key)
        verdicts.append(found[-1] == wanted[program, way][key] if found else None)
    return all_of(*verdicts)


CLAIMS = (
    Claim(
        "Past the second cache a fused chain takes at most half the time of the same chain call by call: "
        "torch.compile, jax.jit and numba alike.",
        fusing_pays_past_the_cache,
        "Call by call every intermediate is written and read again; fused it stays in a register. If it "
        "fails: does the array fit the second cache? Is the compiled way waiting for guards?",
    ),
    Claim(
        "Capturing is not fusing: torch.export and FX are nowhere near 1.5 times as fast as eager torch.",
        capturing_is_not_fusing,
        "Both give a graph, which still runs operation by operation. What makes it fast is a compiler "
        "behind it.",
    ),
    Claim(
        "On 256 numbers NumPy's twelve calls are faster than one call of torch.compile.",
        entering_costs,
        "Guards, the wrapper and the dispatch back into Python cost some ten NumPy calls. If it fails, "
        "guards "
        "have become cheaper: see torch_compiled_call_s against numpy_call_s.",
    ),
    Claim(
        "On 256 numbers numba's loop is at least three times as fast as any eager way.",
        a_compiled_call_is_nothing,
        "One call of machine code; the dispatcher only looks at the arguments' types.",
    ),
    Claim(
        "jax.jit makes the training step at least five times as fast as JAX call by call.",
        step_in_one_call,
        "Without jit JAX traces and transposes the loss anew at each step, and dispatches every operation.",
    ),
    Claim(
        "A loop inside the program (lax.scan) is at least five times as fast as the loop in Python "
        "around JAX.",
        loop_inside,
        "Each step of Python's loop is several dispatches, index and gather among them.",
    ),
    Claim(
        "lax.scan compiles faster than the same loop unrolled by jit.",
        scan_compiles_once,
        "One step is compiled instead of all; the difference grows with the loop.",
    ),
    Claim(
        "One cold call says the opposite of the truth: at the first call eager is ten times as fast at "
        "least, from then on the compiled way is faster.",
        cold_says_the_opposite,
        "The first call compiles. Whoever times it once times the compiler.",
    ),
    Claim(
        "For 256 numbers torch.compile has paid for itself after a thousand calls at the earliest.",
        small_work_never_pays,
        "About a second of compiling against microseconds saved a call, if any are.",
    ),
    Claim(
        "Every new shape is compiled anew by jax.jit; torch.compile compiles twice, the second time for any "
        "length; dynamic=True and numba once.",
        shapes_are_compiled,
        "jit's programs are for exact shapes; torch turns a size that changed into a symbol; numba "
        "compiles for "
        "types, and a length is no part of one. If it fails: the frameworks' rules have changed.",
    ),
    Claim(
        "A Python branch on a value is refused by jax.jit, torch.export, FX and fullgraph=True; "
        "torch.compile "
        "breaks its graph there, and numba compiles it.",
        branches,
        "While a program is captured there are no values. The messages, and the reason of the break, "
        "are below.",
    ),
    Claim(
        "lax.cond and torch.cond put the branch into the program: then jit, fullgraph=True and torch.export "
        "take it.",
        remedies,
        "Both branches are captured, and the choice is an operation.",
    ),
    Claim(
        "A side effect happens at each call in eager torch and under torch.compile, which replays it; "
        "only once, "
        "while the program is captured, under jax.jit, FX and torch.export. None of them says so.",
        effects_are_lost,
        "Captured programs hold operations on arrays. Dynamo also keeps what the function did to Python's "
        "objects, and does it again at each call.",
    ),
)
