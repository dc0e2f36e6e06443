"""Machine code of numba functions, kept on disk: a kernel is compiled once for a machine, not once a process.

numba's own cache knows a function by the file it stands in. Kernels here call functions of other files and
are in part generated, so a file is kept for each combination of: the text of everything in ``kernels``, the
versions of numba and llvmlite, the CPU that is compiled for, the code of the function and of all that it
reaches through closures and globals, its signature and its options. What cannot be described so is compiled
each time. A file that is damaged or was written by another version is compiled anew and replaced. Processes
that want the same code at the same time (the ranks of a job do) compile it once: the others wait for it.
The assembly that ``kernels.inspect`` reads is kept in the same way.

Files lie in ``$PERFLAB_HOME/kernels`` or ``~/.cache/perflab/kernels``, in a folder for each text of the
package; folders that nobody has used for a month are removed. Deleting them costs a compilation.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import pickle
import shutil
import sys
import time
import types as python
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target
from numba.core.runtime import rtsys
from numba.extending import _Intrinsic

_ENTRIES: dict[str, Callable[[], int]] = {}
"""Symbols that kept machine code may call -> what compiles or loads the function and returns its address."""
UNUSED_SECONDS = 30 * 24 * 3600.0
PATIENCE_SECONDS = 60.0
"""So long a process waits for another to compile; one that is stopped shall stop no other."""
_called: list[set[str]] = []
"""Symbols met by the compilations under way, innermost last."""
_LIBRARIES = ("numba", "llvmlite", "numpy", "torch")


def folder() -> Path:
    """Where machine code is kept, in a folder for each text of the package."""
    chosen = os.environ.get("PERFLAB_HOME")
    if chosen:
        return Path(chosen) / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "perflab" / "kernels"


def provide(symbol: str, entry: Callable[[], int]) -> None:
    """Let compiled functions call ``symbol``; ``entry`` gives its address when it is first needed."""
    _ENTRIES[symbol] = entry


def require(symbol: str) -> None:
    """Called while a function is compiled that calls ``symbol``: makes it known to the linker."""
    for called in _called:
        called.add(symbol)
    llvm.add_symbol(symbol, _ENTRIES[symbol]())


def address_of(signature: Any, function: Callable[..., Any], options: dict[str, Any]) -> tuple[int, Any]:
    """(address of the C function that ``numba.cfunc(signature, **options)`` makes, what keeps it alive)."""
    path = _path(signature, function, options)
    if path is None:
        return _compiled(signature, function, options, None)
    if (found := _load(path)) is not None:
        return found
    # numba's own lock first: a thread that compiles, and meets a function that another one waits to compile,
    # would wait for it in turn.
    with global_compiler_lock, _nobody_else(path):
        return _load(path) or _compiled(signature, function, options, path)


def kept_text(
    signature: Any, function: Callable[..., Any], options: dict[str, Any], make: Callable[[], str]
) -> str:
    """What ``make`` says of a function compiled with these types and options: once for a machine."""
    path = _path(signature, function, options, "assembly of ")
    if path is None:
        return make()
    if (kept := _read(path)) is not None:
        return kept.decode()
    text = make()
    _make_folder(path.parent)
    _write(path, text.encode())
    return text


def njit_kept(signature: str, **options: Any) -> Any:
    """Decorator: ``numba.njit(signature, cache=True, **options)``, compiled anew after a change of any file.

    numba itself looks at the function's own file alone, whatever is compiled into it from others.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        compiled = numba.njit(cache=True, **options)(function)
        file = compiled._cache._cache_file
        if not hasattr(file, "_source_stamp"):  # its index has the CPU and numba's version already
            raise RuntimeError(f"numba {numba.__version__} keeps the stamp of its cache elsewhere")
        file._source_stamp = _text()
        compiled.compile(signature)
        compiled.disable_compile()
        return compiled

    return decorate


def _compiled(
    signature: Any, function: Callable[..., Any], options: dict[str, Any], path: Path | None
) -> tuple[int, Any]:
    _called.append(set())
    try:
        compiled = numba.cfunc(signature, **options)(function)
        called = _called[-1]
    finally:
        _called.pop()
    if path is not None and not compiled._library.has_dynamic_globals:
        _save(path, compiled, called)
    return compiled.address, compiled


# --- what a function is --------------------------------------------------------------------------


@cache
def _surroundings() -> str:
    """Digest of the package's text, the compilers and the CPU; the name of the folder."""
    codegen = cpu_target.target_context.codegen()
    versions = numba.__version__, llvmlite.__version__, codegen.magic_tuple()
    return hashlib.sha256(repr((_text(), *versions)).encode()).hexdigest()[:32]


@cache
def _text() -> str:
    """Digest of the package's text."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class _Unknown(Exception):
    """Something that a digest cannot describe."""


def _describe(value: Any, seen: dict[int, int]) -> Any:
    """Plain data that differs where the compiled code may differ; _Unknown where that cannot be told."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if isinstance(value, np.generic | np.ndarray):
        return (value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, python.ModuleType):
        return ("module", _told_by_name(value.__name__))
    if isinstance(value, type):
        return (_told_by_name(value.__module__), repr(value))
    if isinstance(value, numba.types.Type | np.dtype | python.BuiltinFunctionType | np.ufunc):
        return repr(value)
    if isinstance(value, ir.Type | ir.Value):
        return ("llvm", str(value))
    if isinstance(value, tuple | list):
        return tuple(_describe(item, seen) for item in value)
    if isinstance(value, set | frozenset):
        return tuple(sorted(repr(_describe(item, seen)) for item in value))
    if isinstance(value, dict):
        return tuple((_describe(key, seen), _describe(item, seen)) for key, item in value.items())
    if id(value) in seen:
        return ("again", seen[id(value)])
    seen[id(value)] = len(seen)
    if isinstance(value, _Intrinsic):
        return ("intrinsic", _describe(value._defn, seen))
    if hasattr(value, "py_func") and hasattr(value, "targetoptions"):
        return ("compiled", _describe(value.py_func, seen), _describe(value.targetoptions, seen))
    if isinstance(value, python.FunctionType):
        return _describe_function(value, seen)
    if callable(value) and type(value).__module__.startswith(("numba", "functools")):
        return ("callable", type(value).__qualname__, getattr(value, "__name__", ""))
    raise _Unknown(type(value).__name__)


def _told_by_name(module: str) -> str:
    """The name, if it says what is in the module: the text of this package and the versions are known."""
    if module.partition(".")[0] not in (*_LIBRARIES, "kernels", *sys.stdlib_module_names):
        raise _Unknown(module)
    return module


def _describe_function(function: python.FunctionType, seen: dict[int, int]) -> Any:
    own = function.__module__ or ""
    if own.partition(".")[0] in _LIBRARIES:
        return ("library", own, function.__qualname__)
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    found = [
        _describe_code(function.__code__),
        _describe(cells, seen),
        _describe(function.__defaults__, seen),
    ]
    for name in sorted(_names(function.__code__)):
        if name in function.__globals__:
            found.append((name, _describe(function.__globals__[name], seen)))
    return tuple(found)


def _describe_code(code: python.CodeType) -> Any:
    constants = tuple(
        _describe_code(item) if isinstance(item, python.CodeType) else repr(item) for item in code.co_consts
    )
    return (code.co_name, code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars)


def _names(code: python.CodeType) -> set[str]:
    inner = [_names(item) for item in code.co_consts if isinstance(item, python.CodeType)]
    return set(code.co_names).union(*inner)


def _path(
    signature: Any, function: Callable[..., Any], options: dict[str, Any], what: str = ""
) -> Path | None:
    try:
        described = (str(signature), _describe(function, {}), _describe(options, {}))
        digest = hashlib.sha256(repr(described).encode()).hexdigest()
        return folder() / _surroundings() / f"{what}{function.__name__}-{digest[:32]}"
    except (_Unknown, OSError, ValueError):
        return None


# --- files ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _nobody_else(path: Path) -> Iterator[None]:
    """No other process compiles what is kept in this file, for PATIENCE_SECONDS at most."""
    name, lock = path.with_name(f"{path.name}.lock"), None
    _make_folder(path.parent)
    with contextlib.suppress(OSError):
        lock = name.open("w")
    if lock is None:  # nothing can be written there
        yield
        return
    with lock:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(0.01)
        try:
            yield
        finally:
            name.unlink(missing_ok=True)


def _make_folder(place: Path) -> None:
    """The folder of this text of the package, where it can be made; those of old texts are removed then."""
    with contextlib.suppress(OSError):
        if not place.exists():
            place.mkdir(parents=True, exist_ok=True)
            _remove_unused(place)


def _save(path: Path, compiled: Any, called: set[str]) -> None:
    state = compiled._library.serialize_using_object_code()
    declared = {each.name for each in compiled._library._final_module.functions if each.is_declaration}
    external = sorted(name for name in declared if not name.startswith("llvm."))
    _write(path, pickle.dumps((state, compiled._wrapper_name, sorted(called), external)))


def _write(path: Path, data: bytes) -> None:
    """Written beside and renamed, so that no other process reads half of it. A full disk costs nothing."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        temporary.write_bytes(hashlib.sha256(data).digest() + data)
        temporary.replace(path)


def _remove_unused(current: Path) -> None:
    """Remove the folders of other texts in which no file was written or read for UNUSED_SECONDS."""
    oldest = time.time() - UNUSED_SECONDS
    for other in current.parent.iterdir():
        used = [other.stat().st_mtime, *(file.stat().st_atime for file in other.iterdir())]
        if other != current and max(used) < oldest:
            shutil.rmtree(other, ignore_errors=True)


def _read(path: Path) -> bytes | None:
    """What ``_write`` has written there; None where nothing is, or something damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    check, data = content[:32], content[32:]
    return data if hashlib.sha256(data).digest() == check else None


def _load(path: Path) -> tuple[int, Any] | None:
    if (data := _read(path)) is None:
        return None
    state, name, called, external = pickle.loads(data)
    if any(symbol not in _ENTRIES for symbol in called):
        return None
    for symbol in called:
        require(symbol)
    context = cpu_target.target_context
    # What the code calls: most calls only numba's runtime. All that numba may compile (``refresh``, which
    # also imports scipy) takes 0.3 s to set up.
    for provide_more in (lambda: rtsys.initialize(context), context.refresh):
        if any(llvm.address_of_symbol(symbol) is None for symbol in external):
            provide_more()
    library = context.codegen().unserialize_library(state)
    return library.get_pointer_to_function(name), library
