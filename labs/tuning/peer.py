"""The peer: Ray Tune, as its documentation begins (a function, a process a trial) and at its best (a class
whose processes are used again)."""

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


def tuned(
    task: Task, points: Sequence[Point], stop: int, workers: int, reuse: bool, patience_s: float
) -> list[float]:
    """The loss of each point after ``stop`` steps, each trained once, ``workers`` at a time.

    RuntimeError: a trial failed. TimeoutError: not all have ended after ``patience_s``. The process has a Ray
    cluster already.
    """
    load()
    from ray import tune

    trainable = (by_class if reuse else by_function)(task, points, stop)
    with tempfile.TemporaryDirectory(prefix="perflab-tune-") as folder, _silent():
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": 1}),
            param_space={"place": tune.grid_search(list(range(len(points))))},
            tune_config=tune.TuneConfig(
                metric="loss",
                mode="min",
                max_concurrent_trials=workers,
                reuse_actors=reuse,
                time_budget_s=patience_s,
            ),
            run_config=tune.RunConfig(name="trials", storage_path=folder, verbose=0),
        )
        found = tuner.fit()
    if found.errors:
        raise RuntimeError(f"Ray Tune: {len(found.errors)} of {len(points)} trials failed: {found.errors[0]}")
    ended = [result.metrics for result in found if result.metrics and "loss" in result.metrics]
    if len(ended) < len(points):
        raise TimeoutError(
            f"Ray Tune: {len(ended)} of {len(points)} trials had ended after {patience_s:.1f} s, the limit"
        )
    losses = {metrics["config"]["place"]: metrics["loss"] for metrics in ended}
    return [losses[place] for place in range(len(points))]


@contextlib.contextmanager
def _silent() -> Any:
    """Tune prints boxes at verbose=0."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
