"""What a framework's error means, in a sentence: what it could not do, and what to write instead."""

from __future__ import annotations

# Names of exception types -> (what it could not do, what to do). Names, since importing the types would
# load every framework; the first that occurs among the error's own type and its bases counts.
_MEANING = {
    "TracerBoolConversionError": (
        "jax.jit traces without values, so a Python `if` has no value to decide by",
        "write jax.lax.cond or jnp.where, or mark what decides as a static argument",
    ),
    "NonConcreteBooleanIndexError": (
        "jax.jit needs every shape while it traces, and how many elements a mask selects depends on values",
        "write jnp.where(mask, x, 0), or jnp.nonzero(mask, size=...) with a size that is always enough",
    ),
    "TraceError": (
        "torch.fx.symbolic_trace runs the function on proxies, and a proxy has no value to branch on",
        "write torch.cond or torch.where, or trace only the parts without the branch",
    ),
    "GuardOnDataDependentSymNode": (
        "torch.export makes one graph for all inputs, and a Python `if` on a value would make two",
        "write torch.cond or torch.where",
    ),
    "Unsupported": (
        "torch.compile(fullgraph=True) may not leave the graph, and this cannot be part of it",
        "write torch.cond or torch.where, or drop fullgraph=True and accept a graph break",
    ),
    "TypingError": (
        "numba compiles types, and a Python object from outside the function (a list that grows) has none",
        "pass it as a typed argument, return what should be kept, or leave that part to Python",
    ),
}


class Refused(Exception):
    """A framework would not run a program. Its text: which way, what it could not do, what to do instead."""


def refusal(way: str, error: BaseException) -> Refused:
    """The sentence for an error that a way raised; one that is not known here is quoted."""
    for kind in type(error).__mro__:
        if kind.__name__ in _MEANING:
            could_not, instead = _MEANING[kind.__name__]
            return Refused(f"{way}: {could_not} ({type(error).__name__}). Instead: {instead}.")
    if isinstance(error, AssertionError) and "Guard failed" in str(error):
        return Refused(
            f"{way}: the program was exported for one shape and checks it ({str(error).strip()}). Instead: "
            "export it with dynamic_shapes={...: torch.export.Dim.DYNAMIC}."
        )
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return Refused(f"{way}: {type(error).__name__}: {first[:300]}")
