"""The command ``perflab``: thin, and quick to start (no torch, JAX, numba or Ray in this process)."""

from __future__ import annotations

import atexit
import gc
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from bench.traces.cli import trace

app = typer.Typer(
    help="The lab bench for the performance of training and serving: predict, measure, prove, report.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
Json = Annotated[bool, typer.Option("--json", help="machine-readable output")]


def _overrides(pairs: list[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"--set takes key=value, not {pair!r}")
        found[key] = value
    return found


@app.command("list")
def list_labs(as_json: Json = False) -> None:
    """The labs and the question each answers."""
    from dataclasses import fields

    from labs import NAMES, load

    labs = {name: load(name) for name in NAMES}
    if as_json:
        rows: dict[str, Any] = {}
        for name, lab in labs.items():
            known = {f.name: {"default": f.default, **f.metadata} for f in fields(lab.config)}
            rows[name] = {"question": lab.question, "answer": lab.answer, "settings": known}
        print(json.dumps(rows, indent=1, default=str))
        return
    for name, lab in labs.items():
        print(f"{name}: {lab.question}")
        for item in fields(lab.config):
            value = f"{item.name}={item.default}"
            unit = f" ({item.metadata['unit']})" if item.metadata["unit"] else ""
            print(f"    --set {value:28} {item.metadata['help']}{unit}")


@app.command()
def calibrate(
    force: Annotated[
        bool, typer.Option("--force", help="measure anew even if the kept constants still hold")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure this machine's constants (kept per machine; checked again at each run)."""
    from bench.calibrating import CalibrationFailed, calibrated
    from bench.progress import Progress
    from labs.machine import cache_path

    progress = Progress(not as_json)
    try:
        machine, _ = calibrated(progress, force)
    except CalibrationFailed as error:
        _stop(f"calibration failed: {error}", 1)
    finally:
        progress.close()
    if as_json:
        print(json.dumps(machine.to_json(), indent=1))
        return
    from rich.console import Console

    from bench.report.terminal import print_machine

    print_machine(machine, Console())
    print(f"kept in {cache_path()}")


@app.command()
def run(
    labs: Annotated[list[str] | None, typer.Argument(help="labs to run (default: all)")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="small sizes, about a minute a lab")] = False,
    full: Annotated[bool, typer.Option("--full", help="large sizes and many rounds")] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a lab's setting")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda (default: what is there)")] = "",
    machine: Annotated[
        list[str] | None, typer.Option(help="also predict for this machine, not measured")
    ] = None,
    nproc: Annotated[int, typer.Option(min=0, help="ranks of multi-process variants")] = 0,
    output: Annotated[Path, typer.Option(help="results file; the page is written beside it")] = Path(
        "results.json"
    ),
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with the interrupted run of this output")
    ] = False,
) -> None:
    """Predict, measure, prove and report."""
    from bench.calibrating import CalibrationFailed
    from bench.request import Request
    from bench.runner import run as run_request

    if quick and full:
        raise ValueError("--quick and --full exclude each other")
    if device not in ("", "cpu", "cuda"):
        raise ValueError(f"--device takes cpu or cuda, not {device!r}")
    request = Request(
        labs=tuple(labs or ()),
        scale="quick" if quick else "full" if full else "normal",
        overrides=_overrides(settings or []),
        device=device,
        sheets=tuple(machine or ()),
        processes=nproc,
        output=output,
        resume=resume,
    )
    try:
        status = run_request(request)
    except CalibrationFailed as error:
        _stop(f"calibration failed: {error}", 1)
    raise typer.Exit(status)


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="a results file")],
    output: Annotated[Path | None, typer.Option(help="the page (default: beside the results)")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="print Markdown instead")] = False,
) -> None:
    """Turn results into one self-contained HTML page."""
    from bench.results import load

    data = load(results)
    if markdown:
        from bench.report import to_markdown

        print(to_markdown(data))
        return
    from bench.report import write_page
    from bench.request import page_path

    page = output or page_path(results)
    if page.exists() and page.samefile(results):
        raise ValueError(f"--output {page}: the page would be written over the results")
    print(write_page(data, page))


@app.command()
def compare(
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="BASE NEW", help="two results files, profiler reports or folders of ranks"),
    ] = None,
    fail_above: Annotated[
        str, typer.Option(help="exit 1 when a result (or the step) is slower by more, e.g. 5%")
    ] = "",
    last: Annotated[
        int, typer.Option(help="with LAB alone: the oldest and the newest of its last N results here")
    ] = 0,
    markdown: Annotated[bool, typer.Option("--markdown", help="a table for a pull request")] = False,
    output: Annotated[Path | None, typer.Option(help="of profiler reports: write this HTML page")] = None,
    top: Annotated[int, typer.Option(min=1, help="of profiler reports: rows shown")] = 20,
    as_json: Json = False,
) -> None:
    """Compare two results files (also plain pytest-benchmark JSON), or two profiler reports."""
    from bench import compare as comparing

    limit = comparing.parse_share(fail_above) if fail_above else None
    base, new = comparing.two_files(files or [], last)
    if not last:
        from bench.traces.diff_command import are_traces, compare_traces

        if are_traces(base, new):
            raise typer.Exit(
                compare_traces(
                    base, new, limit=limit, as_json=as_json, markdown=markdown, page=output, top=top
                )
            )
    if output is not None:
        raise ValueError("compare --output takes profiler reports; perflab report draws results files")
    raise typer.Exit(comparing.compare_results(base, new, limit=limit, as_json=as_json, markdown=markdown))


@app.command()
def profile(
    words: Annotated[
        list[str], typer.Argument(metavar="LAB[:VARIANT] | -- COMMAND", help="what runs under the profiler")
    ],
    output: Annotated[
        Path | None, typer.Option(help="folder of the reports (default: profile-NAME, a new one)")
    ] = None,
    kind: Annotated[
        str, typer.Option(help="torch, jax or cprofile (default: by what the program imports)")
    ] = "",
    steps: Annotated[int, typer.Option(min=0, help="of a lab's variant (default: 10)")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="a lab's small sizes")] = False,
    full: Annotated[bool, typer.Option("--full", help="a lab's large sizes")] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a lab's setting")
    ] = None,
    nproc: Annotated[int, typer.Option(min=0, help="ranks of a lab's multi-process variants")] = 0,
) -> None:
    """Record a profiler report of a lab's variant, or of a Python program: python script.py ARGS,
    python -m module, torchrun ... (after --, its code unchanged), one file a rank."""
    from bench.profile import command

    if quick and full:
        raise ValueError("--quick and --full exclude each other")
    if "--" in sys.argv:
        if quick or full or settings or nproc or steps:
            raise ValueError("--quick, --full, --set, --nproc and --steps are for labs, not for programs")
        raise typer.Exit(command.profile_program(words, kind, output))
    if len(words) != 1:
        raise ValueError(f"a program comes after --: perflab profile -- {' '.join(words)}")
    status = command.profile_lab(
        words[0],
        kind,
        output,
        scale="quick" if quick else "full" if full else "normal",
        overrides=_overrides(settings or []),
        processes=nproc,
        steps=steps or 10,
    )
    raise typer.Exit(status)


app.command()(trace)


@app.command()
def diagnose(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="TRACE|RESULTS | -- COMMAND", help="a report, a folder of ranks, or a program"
        ),
    ],
    as_json: Json = False,
) -> None:
    """Name what holds a job up (input, python, dispatch, ...), with evidence and what to try."""
    from bench.diagnosis import command

    if "--" in sys.argv:
        raise typer.Exit(command.diagnose_program(words, as_json))
    if len(words) != 1:
        raise ValueError(f"a program comes after --: perflab diagnose -- {' '.join(words)}")
    raise typer.Exit(command.diagnose_path(Path(words[0]), as_json))


@app.command()
def doctor(as_json: Json = False) -> None:
    """May a measurement taken here be trusted? Load, threads, imports, and an A/A test."""
    from bench import doctor as examination

    findings = examination.examine()
    test = examination.self_test()
    if as_json:
        print(json.dumps(examination.to_json(findings, test), indent=1))
    else:
        examination.print_examination(findings, test)
    if any(f.level == examination.BAD for f in findings) or test.comparison.verdict in ("faster", "slower"):
        raise typer.Exit(1)


@app.command()
def inspect(
    name: Annotated[
        str,
        typer.Argument(
            metavar="OP",
            help="an operation of kernels, or package.module:name or file.py:name of a numba function",
        ),
    ],
    target: Annotated[str, typer.Option(help="cpu, sm_80, sm_90, sm_100 or gfx942")] = "cpu",
    signature: Annotated[
        str, typer.Option(help="of a numba function, e.g. 'float32[::1],float32[::1]'")
    ] = "",
    as_json: Json = False,
) -> None:
    """What the compiler made of it: SIMD and libm on a CPU; registers, spills, instructions on a GPU.

    Needs no GPU. Exit status 1 when a configuration spills, cannot be launched, or lacks what it promises.
    """
    from bench.inspection import inspect as inspect_name

    sys.path.insert(0, os.getcwd())
    raise typer.Exit(inspect_name(name, target, signature, as_json))


@app.command()
def serve(
    policy: Annotated[str, typer.Option(help="prefill_first, chunked or disaggregated")] = "chunked",
    workers: Annotated[
        int | None, typer.Option(help="of a policy that does not tell them apart (default 2)")
    ] = None,
    prefill: Annotated[
        int | None, typer.Option(help="workers that read prompts, if disaggregated (default 1)")
    ] = None,
    decode: Annotated[
        int | None, typer.Option(help="workers that write, if disaggregated (default 1)")
    ] = None,
    port: Annotated[int, typer.Option(help="0: any that is free")] = 8000,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    api_key: Annotated[
        str, typer.Option(help="ask clients for it (better in the environment)", envvar="PERFLAB_API_KEY")
    ] = "",
    limit: Annotated[int, typer.Option(help="requests at once; more are answered with 429")] = 256,
    budget: Annotated[
        int | None, typer.Option(help="tokens of a step: the size of a chunk (default: the policy's)")
    ] = None,
    blocks: Annotated[int, typer.Option(help="of 16 tokens in the cache of each worker")] = 512,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="width, layers or context of the model"),
    ] = None,
) -> None:
    """Serve the lab's model behind an OpenAI-compatible endpoint, until Ctrl-C."""
    import time

    from labs.serving.serve import options_of
    from labs.serving.serve import serve as serve_until_stopped

    counts = dict(workers=workers, prefill=prefill, decode=decode, budget=budget, blocks=blocks)
    options = options_of(policy, counts, _overrides(settings or []), host, port, api_key, limit)
    raise typer.Exit(serve_until_stopped(options, time.perf_counter, time.time))


def main() -> None:
    """Entry point: a wrong input is one line and exit status 2; a fault of ours keeps its traceback."""
    atexit.register(gc.freeze)  # what is left then goes with the process: looking for cycles takes 10 ms
    try:
        status = app(standalone_mode=False)  # click hands back what a command raised as typer.Exit
        raise SystemExit(status if isinstance(status, int) else 0)
    except (ValueError, TypeError) as error:
        from bench.request import says_what_is_wrong

        if says_what_is_wrong(error):
            _stop(" ".join(str(error).split()))
        raise
    except (KeyboardInterrupt, typer.Abort):
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except Exception as error:
        # typer brings its own copy of click in some versions: known by what its exceptions can do.
        if hasattr(error, "format_message"):
            _stop(error.format_message())
        raise


def _stop(message: str, status: int = 2) -> NoReturn:
    print(f"perflab: {message}", file=sys.stderr)
    raise SystemExit(status) from None


if __name__ == "__main__":
    main()
