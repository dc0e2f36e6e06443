"""The peer: Ray Tune, as its documentation begins (a function, a process a trial) and at its best (a class
whose processes are used again), and its asynchronous halving."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Sequence
from typing import Any

from labs.tuning.space import Point
from labs.tuning.training import Task, Training

SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard files
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is the command's
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_FORCE_TRIAL_CLEANUP_S": "5",  # a trial past its time is ended, and not asked to end for ten minutes
}


def unavailable() -> str:
    """Why Ray Tune cannot be used here, or ``""``."""
    from importlib.util import find_spec

    lacking = [name for name in ("ray", "pandas", "pyarrow") if not find_spec(name)]
    return f"Ray Tune needs {', '.join(lacking)} (pip install 'ray[tune]')" if lacking else ""


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def by_function(task: Task, points: Sequence[Point], stop: int) -> Any:
    """The function API: each trial is a new process."""

    def trial(config: dict[str, Any]) -> None:
        from ray import tune

        _one_thread()
        losses = Training(task, points[config["place"]]).advance(stop)
        tune.report({"loss": losses[stop]})

    return trial


def by_class(task: Task, points: Sequence[Point], stop: int) -> Any:
    """The class API, whose ``reset_config`` lets a process have another trial."""
    from ray import tune

    class Trial(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            _one_thread()
            self.place = config["place"]

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.place = new_config["place"]
            return True

        def step(self) -> dict[str, Any]:
            losses = Training(task, points[self.place]).advance(stop)
            return {"loss": losses[stop], "done": True}

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            pass

        def load_checkpoint(self, checkpoint: Any) -> None:
            pass

    return Trial


def load() -> None:
    """Import Ray Tune into the driver, which is no part of a search: its settings are read then."""
    os.environ.update(SETTINGS)
    from ray import tune  # noqa: F401


def by_rungs(task: Task, points: Sequence[Point], rungs: Sequence[int]) -> Any:
    """The class API, a step of which goes on to the next rung: where a scheduler decides."""
    from ray import tune

    class Trial(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            _one_thread()
            self.training = Training(task, points[config["place"]])

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.training = Training(task, points[new_config["place"]])
            return True

        def step(self) -> dict[str, Any]:
            stop = next(rung for rung in rungs if rung > self.training.steps)
            losses = self.training.advance(stop)
            return {"loss": losses[stop], "steps": stop, "done": stop == rungs[-1]}

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            pass

        def load_checkpoint(self, checkpoint: Any) -> None:
            pass

    return Trial


def tuned(
    task: Task, points: Sequence[Point], stop: int, workers: int, reuse: bool, patience_s: float
) -> list[float]:
    """The loss of each point after ``stop`` steps, each trained once, ``workers`` at a time.

    RuntimeError: a trial failed. TimeoutError: not all have ended after ``patience_s``. The process has a Ray
    cluster already.
    """
    load()
    trainable = (by_class if reuse else by_function)(task, points, stop)
    return [each["loss"] for each in _last_reports(trainable, points, workers, reuse, patience_s)]


def searched(
    task: Task, points: Sequence[Point], rungs: Sequence[int], eta: int, workers: int, patience_s: float
) -> list[tuple[int, float]]:
    """(steps, loss) of each point where Ray Tune's asynchronous halving stopped it; processes are used again.

    Errors as of ``tuned``.
    """
    load()
    from ray.tune.schedulers import ASHAScheduler

    scheduler = ASHAScheduler("steps", max_t=rungs[-1], grace_period=rungs[0], reduction_factor=eta)
    found = _last_reports(by_rungs(task, points, rungs), points, workers, True, patience_s, scheduler)
    return [(each["steps"], each["loss"]) for each in found]


def _last_reports(
    trainable: Any,
    points: Sequence[Point],
    workers: int,
    reuse: bool,
    patience_s: float,
    scheduler: Any = None,
) -> list[Any]:
    """Of each trial what it reported last, by its point's place."""
    from ray import tune

    with tempfile.TemporaryDirectory(prefix="perflab-tune-") as folder, _silent():
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": 1}),
            param_space={"place": tune.grid_search(list(range(len(points))))},
            tune_config=tune.TuneConfig(
                metric="loss",
                mode="min",
                scheduler=scheduler,
                max_concurrent_trials=workers,
                reuse_actors=reuse,
                time_budget_s=patience_s,
            ),
            run_config=tune.RunConfig(name="trials", storage_path=folder, verbose=0),
        )
        found = tuner.fit()
    if found.errors:
        raise RuntimeError(f"Ray Tune: {len(found.errors)} of {len(points)} trials failed: {found.errors[0]}")
    # A trial that ran out of time has a report too, from where it was.
    ended = [result.metrics for result in found if result.metrics and result.metrics.get("done")]
    if len(ended) < len(points):
        raise TimeoutError(
            f"Ray Tune: {len(ended)} of {len(points)} trials had ended after {patience_s:.1f} s, the limit"
        )
    return sorted(ended, key=lambda metrics: metrics["config"]["place"])


@contextlib.contextmanager
def _silent() -> Any:
    """Tune prints boxes at verbose=0."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
