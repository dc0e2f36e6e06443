"""Ray Train as the launcher of ``labs.train``: ``TorchTrainer``, and what its ranks report."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labs.cluster.rank import Joined, Reports, train_rank

if TYPE_CHECKING:
    from labs.train.loop import StepReport
    from labs.train.options import Options

POLL_S = 0.2
ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths on the command line stay what they are
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",  # asks a dashboard that is not there
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
}
Said = Callable[["Joined | StepReport"], None]


def fit(
    options: Options,
    ranks: int,
    *,
    spread: bool = False,
    failures: int = 0,
    storage: str,
    say: Said = lambda report: None,
) -> list[Joined | StepReport]:
    """Train on the cluster that ``ray.init`` has connected to; what the ranks reported, in order.

    spread: ranks on as many nodes as there are, not as few. failures: so many times the ranks are started
    again after one was lost, from the newest checkpoint. storage: a folder for what Ray Train keeps. say:
    gets each report as it comes. On several machines ``options.checkpoint`` and ``storage`` lie on storage
    that all of them share.

    ValueError: fewer than 1 rank, negative failures, failures without a checkpoint or with that of another
    run, or more ranks than the cluster has processors for. RuntimeError: the training failed, with the reason
    of the rank that said it, or what the ranks reported was lost.
    """
    import ray

    check(options, ranks, failures)
    cuda = options.backend == "nccl"
    kind = "GPU" if cuda else "CPU"
    there = int(ray.cluster_resources().get(kind, 0))
    if there < ranks:
        raise ValueError(f"--ranks {ranks} needs as many {kind}s; this cluster has {there}")
    os.environ.update(ENVIRONMENT)  # read by Ray Train when it is imported
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from labs.cluster.backend import Launched

    if options.checkpoint:
        options = replace(options, checkpoint=str(Path(options.checkpoint).absolute()))
    reports = reports_actor()
    trainer = TorchTrainer(
        train_rank,
        train_loop_config={"options": asdict(options), "reports": reports},
        torch_config=Launched(),
        scaling_config=ScalingConfig(
            num_workers=ranks, use_gpu=cuda, placement_strategy="SPREAD" if spread else "PACK"
        ),
        run_config=RunConfig(storage_path=storage, failure_config=FailureConfig(max_failures=failures)),
    )
    ended = threading.Event()
    found: list[Joined | StepReport] = []
    lost: list[Exception] = []
    follower = threading.Thread(target=_follow, args=(reports, found, lost, say, ended), daemon=True)
    follower.start()
    try:
        trainer.fit()
    except Exception as error:
        raise RuntimeError(f"the training on {ranks} ranks failed: {_reason(error)}") from error
    finally:
        ended.set()
        follower.join(60.0)
    if lost:
        raise RuntimeError(f"the training has ended; what its ranks reported was lost: {lost[0]}")
    return found


def check(options: Options, ranks: int, failures: int) -> None:
    """ValueError for what cannot be launched on any cluster."""
    from parallel.checkpoint import latest

    if ranks < 1:
        raise ValueError(f"--ranks is {ranks}; it is at least 1")
    if failures < 0:
        raise ValueError(f"--failures is {failures}; it is not negative")
    if failures and not options.checkpoint:
        raise ValueError("--failures goes on from a checkpoint: say where with --checkpoint DIR")
    if failures and not options.resume and latest(options.checkpoint):
        raise ValueError(
            f"--checkpoint {options.checkpoint} has checkpoints of another run, from which --failures would "
            "go on: add --resume, or name another folder"
        )


def reports_actor() -> Any:
    """For all that ranks report, on the driver's own node: it outlives every other."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Reports).remote()


def _follow(reports: Any, found: list[Any], lost: list[Exception], say: Said, ended: threading.Event) -> None:
    """Fetch what was reported until the training has ended, and once more. lost: gets the error after which
    nothing more can be fetched."""
    import ray

    last = False
    while not last:
        last = ended.wait(POLL_S)
        try:
            new: Sequence[Any] = ray.get(reports.since.remote(len(found)), timeout=30.0)
        except ray.exceptions.GetTimeoutError as error:
            if last:
                lost.append(error)
            continue  # the cluster is busy; what was reported is still there
        except ray.exceptions.RayError as error:
            lost.append(error)
            return
        for report in new:
            found.append(report)
            say(report)


def _reason(error: BaseException) -> str:
    """The line of the first rank that failed, out of Ray's report of all."""
    failures = getattr(error, "worker_failures", None) or {}
    reasons = [line for each in failures.values() for line in str(each).strip().splitlines()[-1:]]
    lines = reasons or str(error).strip().splitlines()[-1:] or [type(error).__name__]
    return lines[0].strip()
