"""What JAX lets pass in silence, or refuses in words of its own, said in the user's.

``guarded(function)`` is ``jax.jit(function)`` for finding mistakes: at each call it looks whether tracing
changed anything outside, whether a random key is drawn from twice and whether an argument's memory has been
given away. ``explained()`` does the same for the errors of any block. Both raise ``TransformError``.

Only keys of ``jax.random.key`` are followed (raw ``PRNGKey`` arrays are numbers like others), and only what
the function itself names: what functions that it calls change is not seen.
Sources: JAX documentation, "Sharp bits", "Errors", "Buffer donation", ``jax.debug_key_reuse``.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import linecache
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


class TransformError(ValueError):
    """A function that a transformation would refuse, or would silently make another of."""


class Guarded:
    """See the module; called like the function. Slower than ``jit``: for finding mistakes."""

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        import jax

        self._function = function
        self._name = getattr(function, "__name__", "the function")
        self._jitted = jax.jit(function, **options)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        import jax

        bound = inspect.signature(self._function).bind(*arguments, **named)
        for argument, value in bound.arguments.items():
            self._refuse_given_away(argument, value)
        before = outside(self._function)
        printed = io.StringIO()
        with jax.debug_key_reuse(True), explained(self._function):
            with contextlib.redirect_stdout(printed):
                self._jitted.trace(*arguments, **named)
            self._refuse_side_effects(before, outside(self._function), printed.getvalue())
            return self._jitted(*arguments, **named)

    def _refuse_given_away(self, argument: str, value: Any) -> None:
        import jax

        for leaf in jax.tree.leaves(value):
            if isinstance(leaf, jax.Array) and leaf.is_deleted():
                raise TransformError(
                    f"{self._name}: the memory of argument {argument!r} was given away (donate_argnums) to "
                    "an earlier call, which has written its result there. Go on with that call's result, or "
                    "do not donate what is used again"
                )

    def _refuse_side_effects(
        self, before: Mapping[str, object], after: Mapping[str, object], printed: str
    ) -> None:
        changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
        done = [f"changes {name!r}" for name in changed]
        if printed:
            done.append(f"prints {printed.splitlines()[0][:60]!r}")
        if done:
            raise TransformError(
                f"{self._name} {' and '.join(done)} while JAX traces it: under jit that happens once for "
                "each shape and not at each call. Return the value instead, or use jax.debug.print or "
                "jax.debug.callback"
            )


def guarded(function: Callable[..., Any], **options: Any) -> Guarded:
    """``jax.jit(function, **options)`` that raises TransformError where results would surprise."""
    return Guarded(function, **options)


def outside(function: Callable[..., Any]) -> dict[str, object]:
    """The state of what a function names and does not own: by name, as something that can be compared."""
    try:
        named = inspect.getclosurevars(function)
    except TypeError:  # a callable without code of its own, such as a partial
        return {}
    found = {**named.globals, **named.nonlocals}
    return {name: state for name, value in found.items() if (state := _state(value)) is not None}


DEEPEST = 4  # containers in containers that are looked into


class _Same:
    """Equal to itself only; keeps the object, so that no other one gets its place in memory."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value

    __hash__ = None  # type: ignore[assignment]


def _state(value: object, depth: int = DEEPEST) -> object:
    """None for what is a program and not data. An array of JAX's cannot change, but another, or a tracer, may
    take its place; one of NumPy's is known by its bytes, which its text leaves out."""
    import jax
    import numpy as np

    if isinstance(value, (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)):
        return None
    if isinstance(value, jax.Array):  # a tracer is one too
        return _Same(value)
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value.shape, hashlib.sha256(value.tobytes()).digest()
    if isinstance(value, (bool, int, float, complex, str, bytes, bytearray)):
        return type(value), bytes(value) if isinstance(value, bytearray) else value
    if not depth:
        return _Same(value)
    if isinstance(value, (set, frozenset)):
        return type(value), len(value), repr(value)
    if isinstance(value, Mapping):
        return "mapping", [(repr(key), _state(item, depth - 1)) for key, item in value.items()]
    if isinstance(value, np.ndarray):
        value = value.ravel().tolist()  # of objects
    if isinstance(value, (list, tuple)):
        return "sequence", [_state(item, depth - 1) for item in value]
    return ("object", _state(vars(value), depth - 1)) if hasattr(value, "__dict__") else None


@contextlib.contextmanager
def explained(function: Callable[..., Any] | None = None) -> Iterator[None]:
    """Errors of JAX inside the block become TransformErrors that say what to do. Others pass."""
    import jax

    values = (
        jax.errors.ConcretizationTypeError,
        jax.errors.TracerIntegerConversionError,
        jax.errors.TracerArrayConversionError,
        jax.errors.NonConcreteBooleanIndexError,
    )
    try:
        yield
    except jax.errors.KeyReuseError as error:
        raise TransformError(
            f"{_place(function, error)}draws twice from one random key: both draws are the same numbers. "
            "Split it first (key, part = jax.random.split(key)) and draw from each part once"
        ) from error
    except values as error:
        raise TransformError(_asks_for_a_value(function, error)) from error
    except TypeError as error:
        if "concrete values" not in str(error):
            raise
        raise TransformError(_asks_for_a_value(function, error)) from error
    except RuntimeError as error:
        if "has been deleted" not in str(error):
            raise
        raise TransformError(
            f"{_place(function, error)}uses an array whose memory was given away (donate_argnums) to an "
            "earlier call, which has written its result there. Go on with that call's result, or do not "
            "donate what is used again"
        ) from error


def _asks_for_a_value(function: Callable[..., Any] | None, error: Exception) -> str:
    import jax

    place = _place(function, error)
    if isinstance(error, jax.errors.NonConcreteBooleanIndexError):
        return (
            f"{place}selects by a mask whose values jit has not computed yet, so that the result has no "
            "known shape. Keep the shape: jax.numpy.where(mask, x, 0)"
        )
    if isinstance(error, jax.errors.TracerBoolConversionError):
        what, instead = "a branch", "jax.numpy.where or jax.lax.cond (jax.lax.while_loop for a loop)"
    elif isinstance(error, jax.errors.TracerArrayConversionError):
        what, instead = "NumPy", "the function of the same name in jax.numpy"
    else:
        what, instead = "a length or an index of Python's", "a length from shapes, or jax.lax.dynamic_slice"
    return (
        f"{place}needs for {what} a value that jit has not computed yet, as it depends on an argument. Use "
        f"{instead}, or name the argument in static_argnames where it is a setting"
    )


def _place(function: Callable[..., Any] | None, error: BaseException) -> str:
    """``name (file:line, source) ``: the deepest frame of the function's own file, so far as it is known."""
    code = getattr(function, "__code__", None)
    if code is None:
        return "this code "
    line, trace = code.co_firstlineno, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code is code:
            line = trace.tb_lineno
        trace = trace.tb_next
    source = linecache.getline(code.co_filename, line).strip()
    shown = f", {source!r}" if source else ""
    return f"{code.co_name} ({Path(code.co_filename).name}:{line}{shown}) "
