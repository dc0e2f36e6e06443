"""``perflab inspect``: what the compiler made of a function, or of everything that an operation runs."""

from __future__ import annotations

import json
from typing import Any

from labs.lab import nearest

CPU = "cpu"


def inspect(name: str, target: str, signature: str, as_json: bool) -> int:
    """Print it; exit status 1 when a configuration for a GPU breaks a promise (spills, does not fit, ...)."""
    from kernels.machine_code import TARGETS

    targets = [CPU, *TARGETS]
    if target not in targets:
        raise ValueError(f"--target {target!r} is unknown{nearest(target, targets)}")
    if ":" in name:
        if target != CPU:
            raise ValueError(
                f"a numba function is inspected with --target cpu; for {target} give an operation of kernels"
            )
        from kernels.inspect import report

        instructions = report(name, signature or None)
        print(json.dumps(instructions.to_json(), indent=1) if as_json else instructions.summary)
        return 0
    if signature:
        raise ValueError("--signature belongs to a function (package.module:name), not to an operation")
    from kernels.inspect import check_operation

    check_operation(name)
    return _on_cpu(name, as_json) if target == CPU else _on_gpu(name, target, as_json)


def _on_cpu(name: str, as_json: bool) -> int:
    from kernels.inspect import inspect_operation

    bodies = inspect_operation(name)
    if not bodies:
        raise ValueError(f"{name} runs no compiled body of kernels on this CPU")
    if as_json:
        rows = [{"body": place, **code.to_json()} for place, code in bodies.items()]
        _print_json(name, CPU, bodies=rows)
    else:
        from bench.report.inspection import print_cpu

        print_cpu(bodies, _console())
    return 0


def _on_gpu(name: str, target: str, as_json: bool) -> int:
    from bench.progress import Progress

    try:
        import triton
    except ImportError:
        raise ValueError(f"--target {target} needs the package triton, which is not installed") from None
    from kernels.ahead_of_time import MachineCode, compile_all, shipped

    compilations = shipped(name, target)
    if not compilations:
        raise ValueError(f"{name} ships no Triton kernel for {target}")
    progress = Progress(not as_json)
    codes, failures = [], []
    try:
        progress.start(len(compilations))
        for count, (compilation, outcome) in enumerate(compile_all(compilations, target), 1):
            progress.phase(compilation.label, f"compiled for {target}")
            progress.done(count)
            if isinstance(outcome, MachineCode):
                codes.append(outcome)
            else:
                failures.append(str(outcome))
    finally:
        progress.close()
    if as_json:
        _print_json(
            name,
            target,
            triton=triton.__version__,
            kernels=[code.to_json() for code in codes],
            failures=failures,
        )
    else:
        from bench.report.inspection import print_gpu

        print_gpu(codes, _console())
        for failure in failures:
            print(failure)
    return int(bool(failures) or any(code.problems for code in codes))


def _console() -> Any:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=200)  # a log has no margin: one line a kernel


def _print_json(name: str, target: str, **facts: Any) -> None:
    print(json.dumps({"operation": name, "target": target, **facts}, indent=1))
