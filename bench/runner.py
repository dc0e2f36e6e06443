"""The one runner: predict, measure in child processes, assemble, report.

    predictions -> journal -> pytest bench/suites/test_labs.py (a child per allocator mode) -> results file

Before each lab the child checks how fast the machine runs now (``labs/calibration_anchors.py``), and predicts
anew where it differs from its constants.

The parent never measures and imports neither torch nor JAX nor numba. Children are supervised
(``bench/supervise.py``): when the command ends, however it ends, they end too.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import results as results_file
from bench.assemble import assemble, failures
from bench.calibrating import CalibrationFailed, calibrated
from bench.environment import measuring_environment
from bench.history import keep
from bench.journal import Journal
from bench.measure import explain
from bench.plan import SCALE_FACTOR, Plan
from bench.progress import Progress
from bench.request import Request, check_output, page_path, says_what_is_wrong, settings_of
from bench.supervise import Supervised, lines_of
from bench.world.protocol import joined_size
from bench.world.torchrun import join
from labs import load
from labs.lab import Allocator, Scale
from labs.machine import Machine, load_sheet

COLUMNS: tuple[Allocator, ...] = ("default", "tuned")
SILENCE_SECONDS = 240.0  # a group that says nothing for so long hangs
STARTED_WITH = {
    "labs": "choice of labs",
    "scale": "size",
    "overrides": "--set",
    "device": "--device",
    "sheets": "--machine",
    "processes": "--nproc",
}
"""Fields of a Request that --resume keeps as they were, and what a user calls them."""
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
        raise ValueError(f"{path} was started when the labs had other settings: remove it and start anew")
    existed = path.exists()
    with _exclusive(path):
        started = time.monotonic()
        journal = Journal(path)
        with closing(Progress(show)) as progress:
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
                progress.say(f"go on with: {shlex.join(_resume_words(output))}")
                return 130
        elapsed = time.monotonic() - started
        journal.write("end", finished=_now(), seconds=elapsed)
        results = assemble(journal.events())
        results_file.write(results, output)
        keep(results)
        path.unlink()
    return _report(results, output, elapsed, show)


def _resumed(path: Path, request: Request) -> tuple[Mapping[str, Any], Request]:
    header = next((event for event in Journal(path).events() if event["event"] == "plan"), None)
    if header is None or "request" not in header:
        raise ValueError(f"--resume: there is no interrupted run at {path}")
    started, default = dict(header["request"]), Request()
    for name, option in STARTED_WITH.items():
        given = getattr(request, name)
        if given != getattr(default, name) and _plain(given) != started[name]:
            raise ValueError(
                f"--resume goes on with what was started ({header['command']}), not with another {option}: "
                + shlex.join(_resume_words(request.output))
            )
    return header, replace(request, **started)


def _plain(value: Any) -> Any:
    """As JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def _resume_words(output: Path) -> list[str]:
    return ["perflab", "run", "--resume", "--output", str(output)]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _command(request: Request, labs: Sequence[str], settings: Mapping[str, Mapping[str, Any]]) -> str:
    """What runs these labs again as they were run, to be pasted into a shell."""
    words = ["perflab", "run", *labs]
    words += [] if request.scale == "normal" else [f"--{request.scale}"]
    taken = {(name, key) for name in labs or settings for key in settings[name]}
    for key, value in request.overrides.items():
        chosen, _, setting = key.rpartition(".")
        if any(setting == known and chosen in ("", name) for name, known in taken):
            words += ["--set", f"{key}={value}"]
    words += ["--device", request.device] if request.device else []
    words += [word for name in request.sheets for word in ("--machine", name)]
    ranks = any(known == "ranks" for _, known in taken)
    words += ["--nproc", str(request.processes)] if request.processes and ranks else []
    return shlex.join(words)


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
    commands = {name: _command(request, [name], settings) for name in settings}
    journal.write(
        "plan",
        labs=dict(settings),
        scale=request.scale,
        device=request.device,
        command=_command(request, list(request.labs), settings),
        request={name: _plain(getattr(request, name)) for name in STARTED_WITH},
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
            except Exception as error:
                because = str(error) if isinstance(error, ValueError) else explain(error)
                nothing = {"variant": "", "key": "", "predicted": None, "because": because}
                elsewhere.append({"machine": sheet.name, **nothing})
        if elsewhere:
            journal.write("elsewhere", lab=name, predictions=elsewhere)


def measure(
    journal: Journal, settings: Mapping[str, dict[str, Any]], request: Request, progress: Progress
) -> None:
    """Run every (lab, group, column) that the journal does not hold yet."""
    whole = Plan(_with_variants(settings, progress), request.scale, request.device, str(journal.path))
    progress.start(sum(len(whole.groups(column)) for column in COLUMNS))
    lost: list[str] = []  # of this process: what an earlier one lost is tried again
    for column in COLUMNS:
        while True:
            plan = replace(whole, done=[*_measured(journal), *lost])
            progress.done(len(plan.done))
            if not plan.groups(column):
                break
            for (lab, group), reason in _run_child(plan, column, journal, progress).items():
                lost.append(f"{lab}/{group}/{column}")
                journal.write("lost", lab=lab, group=group, column=column, variant="", error=reason)
                progress.say(f"{lab}/{group}: {reason}")


def _with_variants(settings: Mapping[str, dict[str, Any]], progress: Progress) -> dict[str, dict[str, Any]]:
    """The labs that say what is to be measured; of another one ``assemble`` asks why not."""
    found = {}
    for name, values in settings.items():
        try:
            list(load(name).variants(load(name).config(**values)))
            found[name] = dict(values)
        except Exception as error:
            progress.say(f"{name}: variants: {explain(error)}")
    return found


def _measured(journal: Journal) -> list[str]:
    """The groups that have been measured, as ``Plan.done`` has them."""
    groups = (event for event in journal.events() if event["event"] == "group")
    return list(dict.fromkeys(f"{event['lab']}/{event['group']}/{event['column']}" for event in groups))


def _suite_command(plan_file: Path, folder: str) -> list[str]:
    """pytest on the labs' suite with its own root, configuration and plugins: what lies in the user's folder
    must not change the run."""
    options = "-q --import-mode=importlib -p no:cacheprovider -p pytest_benchmark.plugin -p bench.plugin"
    command = [sys.executable, "-P", "-m", "pytest", str(SUITE), *options.split(), "--benchmark-quiet"]
    command += ["--perflab-plan", str(plan_file), "--benchmark-storage", f"file://{folder}/storage"]
    command += ["-c", os.devnull, "--rootdir", str(SUITE.parents[2]), "--confcutdir", str(SUITE.parents[1])]
    return command


def _run_child(
    plan: Plan, column: Allocator, journal: Journal, progress: Progress
) -> dict[tuple[str, str], str]:
    """One pytest child for what is left in a column; the groups that it cannot measure, and why. What it did
    not come to, another child must."""
    with tempfile.TemporaryDirectory() as folder:
        plan_file, log = Path(folder) / "plan.json", f"{folder}/log"
        plan.write(plan_file)
        command = _suite_command(plan_file, folder)
        offset, _ = journal.events_from(0)
        child = Supervised(command, measuring_environment(column, plan.device), log)
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
        last = " | ".join(lines_of(log)[-2:])[-300:]
        reason = (
            f"no sign of life for {silence:.0f} s"
            if hung
            else f"the measuring process ended with status {status}: {last}"
        )
        if current is not None:
            return {current: reason}
        left = replace(plan, done=[*plan.done, *_measured(journal)]).groups(column)
        # A child that went through its groups and began none of them would not the next time either.
        return dict.fromkeys(left if status in (0, 1) and not hung else left[:1], reason)


def _report(results: Mapping[str, Any], output: Path, elapsed: float, show: bool) -> int:
    from bench.report import write_page

    problems = failures(results)
    page = write_page(results, page_path(output))
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
        if not says_what_is_wrong(error):
            raise
        print(f"labs.{name}: {error}", file=sys.stderr)
        return 2
    except CalibrationFailed as error:
        print(f"labs.{name}: calibration failed: {error}", file=sys.stderr)
        return 1
