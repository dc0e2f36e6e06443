"""What compiling costs once, and what a compiled function costs at each call.

Used by ``labs.calibration``, in its first sweep only: most of it is importing a compiler. The functions
compiled here are in no lab: a constant never comes from the program it predicts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from labs.calibration_calls import torch_call
from labs.calibration_hardware import Figures, typical
from labs.machine import usable_cores

CALLS = 500
ITEMS = 9
CXX_LIMIT_S = 60.0


def _least(compile_one: Callable[[int], object], count: int) -> float:
    """Seconds of the fastest of a few compilations, each of a program of its own; one goes before."""
    compile_one(0)
    seconds = []
    for number in range(1, count + 1):
        begin = time.perf_counter()
        compile_one(number)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def numba_compiler() -> Figures:
    import numba
    import numpy

    values = numpy.ones(3, numpy.float32)

    def compile_one(number: int) -> None:
        @numba.njit
        def loop(x: numpy.ndarray) -> numpy.ndarray:
            out = numpy.empty_like(x)
            for place in range(x.size):
                out[place] = x[place] - number
            return out

        loop(values)

    made = numba.njit(lambda x: numpy.empty_like(x))
    made(values)

    def many() -> None:
        for _ in range(CALLS):
            made(values)

    return {
        "numba_compile_s": (_least(compile_one, 3), "njit of a loop over an array, compiled and called"),
        "numba_array_call_s": (
            typical(many) / CALLS,
            "njit function that returns a new array of three items",
        ),
    }


def jax_compiler() -> Figures:
    import jax
    import jax.numpy as jnp

    numbers = jnp.ones(64, device=jax.devices("cpu")[0])

    def compile_one(number: int) -> None:
        jax.jit(lambda x: (-x - number).max())(numbers).block_until_ready()

    return {
        "jax_first_call_s": (
            _least(compile_one, 5),
            "jit of two operations on 64 numbers and the largest of them, traced, compiled and called",
        )
    }


def torch_capture() -> Figures:
    import torch

    one = torch.ones(1)

    def compile_one(number: int) -> Callable[[torch.Tensor], torch.Tensor]:
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: -x - number, backend="aot_eager")
        compiled(one)
        return compiled

    captured = _least(compile_one, 3)
    compiled = compile_one(9)

    def many() -> None:
        for _ in range(CALLS):
            compiled(one)

    called = typical(many, 5) / CALLS
    recorded = torch.ones(1, requires_grad=True)
    with_gradient = compile_one(10)

    def there_and_back() -> None:
        for _ in range(CALLS // 5):
            torch.autograd.grad(with_gradient(recorded), recorded)

    there_and_back()
    gradient = typical(there_and_back, 5) / (CALLS // 5)
    items = [torch.ones(1, requires_grad=True) for _ in range(ITEMS)]
    summed = torch.compile(lambda *items: sum([-item for item in items]), backend="aot_eager")

    def all_there_and_back() -> None:
        for _ in range(CALLS // 10):
            torch.autograd.grad(summed(*items), items)

    all_there_and_back()
    several = typical(all_there_and_back, 5) / (CALLS // 10)
    inside = 3 * torch_call(5)  # of each more: a negation and a sum, and the gradient of the first
    torch._dynamo.reset()
    program = torch.export.export(torch.nn.Tanh(), (one,)).module()

    def exported() -> None:
        for _ in range(CALLS):
            program(one)

    return {
        "torch_capture_s": (
            captured,
            "torch.compile of two operations, backend aot_eager: captured and called",
        ),
        "torch_exported_call_s": (
            typical(exported, 5) / CALLS,
            "a call of an exported program of one operation: inputs checked and flattened, one eager "
            "operation",
        ),
        "torch_compiled_gradient_s": (
            gradient,
            "the compiled function of torch_compiled_call_s, recorded, and its gradient",
        ),
        "torch_compiled_array_s": (
            max((several - gradient) / (ITEMS - 1) - inside, 0.0),
            f"a compiled sum of {ITEMS} negations and its gradients, less that of one "
            "and eager operations: an argument more, in and its gradient out",
        ),
        "torch_compiled_call_s": (called, "that function's call: guards, wrapper and two eager operations"),
    }


def cxx_compiler() -> Figures:
    with cxx_compiler_beside() as measure:
        return measure()


@contextmanager
def cxx_compiler_beside() -> Iterator[Callable[[], Figures]]:
    """``cxx_compiler``, which compiles torch's header meanwhile, in a process of its own, where there is
    another core for it.

    The C++ that torch.compile writes includes this header, which torch has compiled once and for all, and
    which is most of compiling it otherwise: seconds of one core.
    """
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder:
        header = Path(folder) / "prefix.h"
        header.write_text("#include <torch/csrc/inductor/cpp_prefix.h>\n")

        def start() -> None:
            arguments = ["-x", "c++-header", str(header), "-o", f"{header}.gch"]
            command, nowhere = [*_cxx_command(), *arguments], subprocess.DEVNULL
            processes.append(subprocess.Popen(command, stdout=nowhere, stderr=nowhere))

        def measure() -> Figures:
            if not processes:
                start()
            try:
                if status := processes[0].wait(CXX_LIMIT_S):
                    raise RuntimeError(f"the C++ compiler failed on torch's header: exit status {status}")
            except subprocess.TimeoutExpired as error:
                raise RuntimeError(f"the C++ compiler failed on torch's header: {error}") from error
            return _compiled_with(_cxx_command(), header)

        if usable_cores() > 1:
            with suppress(RuntimeError, OSError):  # ``measure`` tries again, and says why not
                start()
        try:
            yield measure
        finally:
            for process in processes:
                process.kill()
                process.wait()


def _cxx_command() -> list[str]:
    from torch.utils.cpp_extension import include_paths

    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    if compiler is None:
        raise RuntimeError("there is no C++ compiler on the path, and CXX names none")
    options = ["-fPIC", "-O3", "-ffast-math", "-march=native", "-std=c++20"]
    return [compiler, *options, *(f"-I{path}" for path in include_paths())]


def _compiled_with(command: Sequence[str], header: Path) -> Figures:
    def compile_one(number: int) -> None:
        source = header.with_name(f"less_{number}.cpp")
        source.write_text(
            f'extern "C" void less_{number}(const float* in, float* out, long count) {{\n'
            f"    for (long place = 0; place < count; ++place) out[place] = -in[place] - {number};\n}}\n"
        )
        arguments = ["-include", str(header), "-shared", str(source), "-o", str(source.with_suffix(".so"))]
        try:
            subprocess.run([*command, *arguments], capture_output=True, timeout=CXX_LIMIT_S, check=True)
        except subprocess.SubprocessError as error:
            raise RuntimeError(f"the C++ compiler failed on a loop: {error}") from error

    return {
        "cxx_compile_s": (
            _least(compile_one, 2),
            "C++ compiler on a loop, torch's header for generated kernels compiled before, least of 2",
        )
    }
