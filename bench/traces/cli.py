"""``perflab trace``: its arguments. What it does is in ``bench.traces.commands``, imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def trace(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="PATH ...", help="a profiler report, or those of a job's ranks"),
    ] = None,
    step: Annotated[str, typer.Option(help="only this step: its name, or the number in it")] = "",
    top: Annotated[int, typer.Option(min=1, help="rows of each table")] = 10,
    markdown: Annotated[bool, typer.Option("--markdown", help="tables for a pull request")] = False,
    output: Annotated[Path | None, typer.Option(help="write this HTML page, with a timeline")] = None,
    merge: Annotated[
        Path | None, typer.Option(help="write all ranks into this Chrome trace (.json or .gz)")
    ] = None,
    max_idle: Annotated[str, typer.Option(help="exit 1 when more of the time is idle, e.g. 20%")] = "",
    max_exposed: Annotated[str, typer.Option(help="exit 1 when more of the time only communicates")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable output")] = False,
) -> None:
    """What a profiler report says: where time and memory went, why nothing ran, which rank was late.

    Reads reports of PyTorch, JAX, nsys, cProfile, py-spy, viztracer and speedscope, zipped or not; a folder
    is one job, each file in it a rank.
    """
    from bench.traces import commands

    if not paths:
        raise ValueError("trace takes a profiler report, or a folder of them: perflab trace PATH")
    if as_json and markdown:
        raise ValueError("--json and --markdown exclude each other")
    given = {"--max-idle": max_idle, "--max-exposed": max_exposed}
    raise typer.Exit(
        commands.trace(
            paths,
            step=step,
            top=top,
            as_json=as_json,
            markdown=markdown,
            page=output,
            merged=merge,
            limits=[commands.Limit.of(option, text) for option, text in given.items() if text],
        )
    )
