"""What the compiler made of a function: SIMD or scalar, how wide, fused or not, which calls of libm.

Reads the assembly that numba keeps of each compiled signature, without the wrapper through which Python
calls it. ``inspect_function`` takes a numba function, ``report`` the name of one, ``inspect_operation`` a
public operation of ``kernels``, whose bodies it finds by running it; ``kernels.assembly`` says what is
counted and how the verdict is reached. What Triton made of an operation: ``kernels.ahead_of_time``.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kernels.assembly import Instructions, Loop, read_assembly

__all__ = [
    "Instructions",
    "Loop",
    "assembly_of",
    "check_operation",
    "inspect_function",
    "inspect_operation",
    "load_function",
    "read_assembly",
    "report",
]


def _argument_types(function: Any, arguments: Any) -> tuple[Any, ...]:
    """numba types from a signature string, types, sample values, or the one signature that is compiled."""
    from numba import typeof, types
    from numba.core import sigutils

    if arguments is None:
        compiled = list(function.overloads)
        if len(compiled) == 1:
            return tuple(compiled[0])
        name = function.py_func.__name__
        if not compiled:
            raise ValueError(
                f"{name} has not been compiled: give a signature such as 'float32[::1], float32[::1]'"
            )
        choices = "; ".join(", ".join(map(str, signature)) for signature in compiled)
        raise ValueError(f"{name} is compiled for several signatures, give one of: {choices}")
    if isinstance(arguments, str):
        text = arguments.strip()
        try:
            if not re.match(r"^[\w.]+\s*\(", text):  # without a return type: the arguments alone
                text = f"({text.strip('()')},)" if text.strip("()") else "()"
            return tuple(sigutils.normalize_signature(text)[0])
        except Exception as error:
            raise ValueError(
                f"{arguments!r} is no signature of numba types ({error}); one is 'float32[::1], "
                "float32[::1], int64'"
            ) from None
    if not isinstance(arguments, tuple | list):
        raise TypeError(f"arguments must be a signature string or a tuple, not {type(arguments).__name__}")
    return tuple(value if isinstance(value, types.Type) else typeof(value) for value in arguments)


def assembly_of(function: Any, argument_types: tuple[Any, ...]) -> str:
    """The assembly of one signature of a numba function, which is left as it was.

    Compiled once for a machine (see ``kernels.compiled_cache``). ValueError when the types do not fit.
    """
    from kernels.compiled_cache import kept_text

    def compiled_before() -> str:
        return _text(function, argument_types) if argument_types in function.overloads else ""

    def make() -> str:
        return compiled_before() or _text(_compiled_copy(function, argument_types), argument_types)

    # What was compiled before is not kept, but for kernels: globals that it read may have changed since.
    ours = function.py_func.__module__.partition(".")[0] == "kernels"
    if not ours and (found := compiled_before()):
        return found
    return kept_text(argument_types, function.py_func, function.targetoptions, make)


def _text(function: Any, argument_types: tuple[Any, ...]) -> str:
    """Empty where it was loaded from numba's cache, which keeps no assembly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "inspection disabled for cached code": seen by what is missing
        assembly = function.overloads[argument_types].library.get_asm_str() or ""
    return assembly if re.search(r"\.type\s+\S+,\s*[@%]function|\.globl", assembly) else ""


def _compiled_copy(function: Any, argument_types: tuple[Any, ...]) -> Any:
    from numba import jit

    copy = jit(**function.targetoptions)(function.py_func)
    try:
        copy.compile(argument_types)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        shown = ", ".join(map(str, argument_types))
        raise ValueError(
            f"{function.py_func.__name__} cannot be compiled for ({shown}): {reason[0]}"
        ) from None
    return copy


def _is_dispatcher(value: Any) -> bool:
    return all(hasattr(value, name) for name in ("overloads", "py_func", "targetoptions", "inspect_asm"))


def inspect_function(function: Any, arguments: Any = None) -> Instructions:
    """What numba made of ``function`` (an ``njit`` dispatcher) for one signature.

    arguments: a signature string (``"float32[::1], int64"``), a tuple of numba types or of sample values, or
    None for the one signature that has been compiled. A signature that has not been compiled yet is compiled
    in a copy. TypeError when ``function`` is no numba function, ValueError when the signature does not fit.
    """
    if not _is_dispatcher(function):
        kind = type(function).__name__
        raise TypeError(f"only functions compiled by numba.njit can be inspected, not a {kind}")
    from llvmlite import binding
    from numba.core.registry import cpu_target

    argument_types = _argument_types(function, arguments)
    assembly = assembly_of(function, argument_types)
    isa = binding.get_process_triple().split("-")[0].replace("arm64", "aarch64").replace("amd64", "x86_64")
    cpu = cpu_target.target_context.codegen()._get_host_cpu_name()
    shown = ", ".join(map(str, argument_types))
    return read_assembly(assembly, function.py_func.__name__, shown, isa, cpu)


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """A console script has not its working directory on the import path; what it shall inspect lies there."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def load_function(name: str) -> Any:
    """The numba function ``package.module:name`` or ``file.py:name``; ValueError says what is wrong."""
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise ValueError(f"{name!r} names no function; write package.module:name or path/to/file.py:name")
    try:
        if place.endswith(".py"):
            path = Path(place)
            if not path.is_file():
                raise ValueError(f"there is no file {place}")
            spec = importlib.util.spec_from_file_location(path.stem, path)
            if spec is None or spec.loader is None:
                raise ValueError(f"{place} cannot be imported")
            module = importlib.util.module_from_spec(spec)
            with _importing_from(path.resolve().parent):
                spec.loader.exec_module(module)
        else:
            with _importing_from(Path.cwd()):
                module = importlib.import_module(place)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{place} cannot be imported: {type(error).__name__}: {error}") from None
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(
                part, [item for item in vars(found) if not item.startswith("__")], 1
            )
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{place} has no {attribute!r}{hint}")
        found = getattr(found, part)
    found = getattr(found, "compiled", found)  # of a ``kernels.threads.chunked`` body
    if not _is_dispatcher(found):
        raise ValueError(
            f"{name} is a {type(found).__name__}, not a numba function: decorate it with numba.njit"
        )
    return found


def report(name: str, signature: str | None = None) -> Instructions:
    """``inspect_function`` by name, for ``perflab inspect NAME --target cpu``. ValueError on bad input."""
    return inspect_function(load_function(name), signature)


def check_operation(name: str) -> None:
    """ValueError, with the nearest name, when ``kernels`` has no public operation of this name."""
    import kernels

    names = [known for known in kernels.__all__ if known != "FallbackWarning"]
    if name not in names:
        close = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(names)}"
        raise ValueError(f"{name!r} is no operation of kernels and no package.module:name; {hint}")


def inspect_operation(name: str) -> dict[str, Instructions]:
    """What numba made of each body that the operation runs in float32, forward and backward.

    The keys are ``package.module:name``. Runs the operation once, at the smallest size worth timing; in its
    first dtype if it does not take float32. ValueError when ``kernels`` has no such operation.
    """
    check_operation(name)
    from kernels.op import without_crossover
    from kernels.threads import calls_in

    with without_crossover():
        calls = calls_in(_example(name))
    found = {}
    for body, signatures in sorted(calls.items(), key=lambda call: _place(call[0])):
        for signature in signatures:
            label, number = _place(body), 1
            while label in found:
                number += 1
                label = f"{_place(body)} ({number})"
            found[label] = inspect_function(body.compiled, signature)
    return found


def _place(body: Any) -> str:
    function = body.compiled.py_func
    return f"{function.__module__}:{function.__qualname__}"


def _example(name: str) -> Callable[[], object]:
    """The step that runs the operation, with its gradients, at the smallest size worth timing."""
    import torch

    from kernels import spec

    for operation in spec.operations():
        if operation.name == name:
            dtype = torch.float32 if torch.float32 in operation.dtypes else operation.dtypes[0]
            sizes = [size.arguments(dtype) for size in operation.sizes]
            arguments = min(
                sizes, key=lambda made: spec.tensor_bytes(*filter(torch.is_tensor, made.values()))
            )
            direction = "forward+backward" if operation.gradients else "forward"
            return lambda: spec.step_of(operation.function, arguments, operation.gradients, direction)()
    lines = [line for line in spec.benchmarks() if line.operation == name]
    if not lines:
        raise ValueError(f"{name} is in no family's spec.py, so that there is no case of it to run")
    line = min(lines, key=lambda line: (line.dtype is not torch.float32, line.bytes_moved))
    return lambda: line.ways("cpu")["kernels"]()
