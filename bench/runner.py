"""The one runner: predict, measure in child processes, assemble, report.

    predictions -> journal -> pytest bench/suites/test_labs.py (a child per allocator mode) -> results file

The parent never measures and imports neither torch nor JAX nor numba. Children are supervised
(``bench/supervise.py``): when the command ends, however it ends, they end too.
"""

from __future__ import annotations

import fcntl
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import results as results_file
from bench.assemble import assemble, failures
from bench.environment import allocator_environment
from bench.history import keep
from bench.journal import Journal
from bench.measure import explain
from bench.plan import SCALE_FACTOR, Plan
from bench.progress import Progress
from bench.request import Request, check_output, settings_of
from bench.supervise import Supervised
from bench.world.protocol import joined_size
from bench.world.torchrun import join
from labs import load
from labs.lab import Allocator, Scale
from labs.machine import Machine, load_cached, load_sheet

COLUMNS: tuple[Allocator, ...] = ("default", "tuned")
SILENCE_SECONDS = 240.0  # a group that says nothing for so long hangs
SUITE = Path(__file__).parent / "suites" / "test_labs.py"


def journal_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.journal")


@contextmanager
def _exclusive(journal: Path) -> Iterator[None]:
    """Refuse a second run into the same file."""
    with open(journal, "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another run is writing {journal}; choose another --output") from None
        yield


# --- running -------------------------------------------------------------------------------------


def run(request: Request, *, show: bool = True) -> int:
    """Run the labs; 0 all well, 1 a lab, a proof or a claim failed. ValueError: the request was wrong."""
    output = Path(request.output)
    check_output(output)
    path = journal_path(output)
    header: Mapping[str, Any] | None = None
    if request.resume:
        header, request = _resumed(path, request)
    settings = settings_of(request)
    sheets = [load_sheet(name) for name in request.sheets]
    if header is not None and dict(header["labs"]) != settings:
        raise ValueError(f"{path} was started with other labs or settings; run {header['command']} --resume")
    existed = path.exists()
    with _exclusive(path):
        started = time.monotonic()
        progress = Progress(show)
        journal = Journal(path)
        try:
            machine, message = calibrated(progress)
            if request.device == "cuda" and machine.gpu is None:
                raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu")
        except BaseException:
            if not existed:
                path.unlink(missing_ok=True)  # nothing was started: leave nothing
            raise
        if header is None:
            path.write_text("")
            _predict(journal, request, settings, machine, sheets, message)
        try:
            measure(journal, settings, request, progress)
        except KeyboardInterrupt:
            progress.close()
            results_file.write(assemble(journal.events()), output)
            progress.say(f"stopped; what was measured is in {output}")
            progress.say(f"go on with: perflab run --resume --output {output}")
            return 130
        finally:
            progress.close()
        elapsed = time.monotonic() - started
        journal.write("end", finished=_now(), seconds=elapsed)
        results = assemble(journal.events())
        results_file.write(results, output)
        keep(results)
        path.unlink()
    return _report(results, output, elapsed, show)


def _resumed(path: Path, request: Request) -> tuple[Mapping[str, Any], Request]:
    from dataclasses import replace

    header = next((event for event in Journal(path).events() if event["event"] == "plan"), None)
    if header is None:
        raise ValueError(f"--resume: there is no interrupted run at {path}")
    known: dict[str, Any] = {"device": header["device"], "scale": header["scale"]}
    if not request.labs:
        known["labs"] = tuple(header["labs"])
    if not request.overrides:
        known["overrides"] = {
            f"{lab}.{key}": value
            for lab, settings in header["labs"].items()
            for key, value in settings.items()
        }
    return header, replace(request, **known)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _command(request: Request, labs: Sequence[str]) -> str:
    words = ["perflab", "run", *labs]
    words += [] if request.scale == "normal" else [f"--{request.scale}"]
    words += [f"--set {key}={value}" for key, value in request.overrides.items()]
    words += [f"--device {request.device}"] if request.device else []
    words += [f"--machine {name}" for name in request.sheets]
    words += [f"--nproc {request.processes}"] if request.processes else []
    return " ".join(words)


def _predict(
    journal: Journal,
    request: Request,
    settings: Mapping[str, dict[str, Any]],
    machine: Machine,
    sheets: Sequence[Machine],
    message: str,
) -> None:
    """Write the plan and every prediction; nothing has been timed yet."""
    notes = [message] if message else []
    commands = {name: _command(request, [name]) for name in settings}
    journal.write(
        "plan",
        labs=dict(settings),
        scale=request.scale,
        device=request.device,
        command=_command(request, list(request.labs)),
        commands=commands,
        started=_now(),
        machine=machine.to_json(),
        notes=notes,
    )
    for name in settings:
        lab = load(name)
        config = lab.config(**settings[name])
        for column in lab.columns:
            try:
                predictions = [asdict(p) for p in lab.predict(config, machine.with_allocator(column))]
            except Exception as error:  # reported as the lab's fault; it and the others are still measured
                predictions, fault = [], {"group": "", "variant": "predict", "error": explain(error)}
                journal.write("error", lab=name, column=column, **fault)
            journal.write("predictions", lab=name, column=column, predictions=predictions)
        elsewhere = []
        for sheet in sheets:
            try:
                for prediction in lab.predict(config, sheet):
                    item = asdict(prediction)
                    item["predicted"] = item.pop("value")
                    elsewhere.append({"machine": sheet.name, **item})
            except ValueError as error:
                elsewhere.append(
                    {
                        "machine": sheet.name,
                        "variant": "",
                        "key": "",
                        "predicted": None,
                        "because": str(error),
                    }
                )
        if elsewhere:
            journal.write("elsewhere", lab=name, predictions=elsewhere)


def calibrated(progress: Progress, force: bool = False) -> tuple[Machine, str]:
    """This machine's constants: cached ones that still hold, or new ones; measured in a child process."""
    with tempfile.TemporaryDirectory() as folder:
        log = f"{folder}/log"
        command = [sys.executable, "-m", "labs.calibration", *(["--force"] if force else [])]
        child = Supervised(command, _environment("default", ""), log)
        progress.phase("calibration", "measuring this machine's constants")
        try:
            while (status := child.poll()) is None:
                lines = _lines(log)
                if lines:
                    progress.phase("calibration", lines[-1])
                time.sleep(0.1)
        finally:
            child.end()
        machine = load_cached()
        lines = _lines(log)
        if status or machine is None:
            raise RuntimeError(f"calibration failed: {' | '.join(lines[-2:]) or f'exit status {status}'}")
    import json

    try:
        message = str(json.loads(lines[-1])["message"])
    except (ValueError, KeyError, TypeError, IndexError):
        message = ""
    progress.say(message or f"calibration: {machine.name}")
    return machine, message


def _lines(path: str) -> list[str]:
    with open(path, errors="replace") as file:
        return [line.strip() for line in file if line.strip()]


def _environment(column: str, device: str) -> dict[str, str]:
    environment = {**os.environ, **allocator_environment(column)}
    environment["PYTHONUNBUFFERED"] = "1"
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # other plugins would import, slow down, or interfere
    for name in ("PYTEST_ADDOPTS", "PYTEST_PLUGINS"):
        environment.pop(name, None)
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def measure(
    journal: Journal, settings: Mapping[str, dict[str, Any]], request: Request, progress: Progress
) -> None:
    """Run every (lab, group, column) that the journal does not hold yet."""
    plans = {c: Plan(dict(settings), request.scale, request.device, str(journal.path)) for c in COLUMNS}
    progress.start(sum(len(plans[column].groups(column)) for column in COLUMNS))
    for column in COLUMNS:
        while True:
            done = _done(journal)
            plan = Plan(dict(settings), request.scale, request.device, str(journal.path), done)
            left = plan.groups(column)
            progress.done(len(done))
            if not left or not _run_child(plan, column, journal, progress):
                break


def _done(journal: Journal) -> list[str]:
    done = {}
    for event in journal.events():
        if event["event"] in ("group", "lost"):
            done[f"{event['lab']}/{event['group']}/{event['column']}"] = True
    return list(done)


def _suite_command(plan_file: Path, folder: str) -> list[str]:
    """pytest on the labs' suite with its own root, configuration and plugins: what lies in the user's folder
    must not change the run."""
    options = "-q --import-mode=importlib -p no:cacheprovider -p pytest_benchmark.plugin -p bench.plugin"
    command = [sys.executable, "-m", "pytest", str(SUITE), *options.split(), "--benchmark-quiet"]
    command += ["--perflab-plan", str(plan_file), "--benchmark-storage", f"file://{folder}/storage"]
    command += ["-c", os.devnull, "--rootdir", str(SUITE.parents[2]), "--confcutdir", str(SUITE.parents[1])]
    return command


def _run_child(plan: Plan, column: Allocator, journal: Journal, progress: Progress) -> bool:
    """One pytest child for what is left in a column. True when it broke off and another must go on."""
    with tempfile.TemporaryDirectory() as folder:
        plan_file, log = Path(folder) / "plan.json", f"{folder}/log"
        plan.write(plan_file)
        command = _suite_command(plan_file, folder)
        offset, _ = journal.events_from(0)
        child = Supervised(command, _environment(column, plan.device), log)
        heard, current, hung = time.monotonic(), None, False
        silence = SILENCE_SECONDS * max(1.0, SCALE_FACTOR[plan.scale] / 3)
        try:
            while True:
                status = child.poll()
                offset, events = journal.events_from(offset)
                for event in events:
                    heard = time.monotonic()
                    if event["event"] == "started":
                        current = (event["lab"], event["group"])
                    elif event["event"] == "group":
                        current = None
                    progress.event(event)
                if status is not None and not events:
                    break
                if time.monotonic() - heard > silence:
                    hung = True
                    break
                time.sleep(0.1)
        finally:
            child.end()
        if status in (0, 1) and not hung and current is None:
            return False
        last = " | ".join(_lines(log)[-2:])[-300:]
        reason = (
            f"no sign of life for {silence:.0f} s"
            if hung
            else f"the measuring process ended with status {status}: {last}"
        )
        if current is None:
            current = plan.groups(column)[0]
        journal.write("lost", lab=current[0], group=current[1], column=column, variant="", error=reason)
        progress.say(f"{current[0]}/{current[1]}: {reason}")
        return True


def _report(results: Mapping[str, Any], output: Path, elapsed: float, show: bool) -> int:
    from bench.report import write_page

    problems = failures(results)
    page = write_page(results, output.with_suffix(".html"))
    if show:
        from rich.console import Console

        from bench.report.terminal import print_lab

        console = Console()
        for name, lab in results["perflab"]["labs"].items():
            print_lab({"name": name, **lab}, console)
        console.print(f"{elapsed:.0f} s; results: {output}; page: {page}", soft_wrap=True)
        for problem in problems:
            console.print(f"FAILED {problem}", style="bold red", soft_wrap=True, markup=False)
    return 1 if problems else 0


def run_lab(
    name: str,
    *,
    scale: Scale = "normal",
    overrides: Mapping[str, str] | None = None,
    output: str | None = None,
) -> int:
    """``python -m labs.NAME``, and under torchrun: join the world that was started, rank 0 runs the lab."""
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        return join()
    chosen = Path(output) if output else Path(f"results-{name}.json")
    try:
        settings = {item.name for item in fields(load(name).config)}
        ranks = joined_size() if "ranks" in settings and "ranks" not in (overrides or {}) else 0
        request = Request((name,), scale, overrides or {}, processes=ranks, output=chosen)
        return run(request)
    except ValueError as error:
        print(f"labs.{name}: {error}", file=sys.stderr)
        return 2
