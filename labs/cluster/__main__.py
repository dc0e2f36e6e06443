"""``python -m labs.cluster --ranks 2 --strategy fsdp``: a line a step, from wherever rank 0 is."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from labs.train.options import Options


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, Options]:
    """(the launcher's options, the training's); a wrong one ends the process with status 2 and a line."""
    from labs.cluster.launch import check
    from labs.train.options import Options, add_to

    parser = argparse.ArgumentParser(
        prog="python -m labs.cluster",
        description="Train a GPT on a Ray cluster. What is not of the cluster is as for labs.train.",
    )
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument("--ranks", type=int, default=2, metavar="N", help="processes that train (default 2)")
    cluster.add_argument("--spread", action="store_true", help="on as many nodes as there are, not as few")
    cluster.add_argument(
        "--failures",
        type=int,
        default=0,
        metavar="N",
        help="losses of ranks after which to go on (default 0)",
    )
    cluster.add_argument(
        "--address",
        default="",
        help="of a running cluster, auto to find it; empty: RAY_ADDRESS or a local one",
    )
    cluster.add_argument(
        "--storage",
        default="",
        metavar="DIR",
        help="what Ray Train keeps; on several machines shared by them",
    )
    add_to(parser.add_argument_group("training"))
    given = parser.parse_args(arguments)
    own = ("ranks", "spread", "failures", "address", "storage")
    try:
        options = Options(**{name: value for name, value in vars(given).items() if name not in own})
        check(options, given.ranks, given.failures)
    except ValueError as error:
        parser.error(str(error))
    return given, options


def _say(steps: int) -> Any:
    from labs.cluster.rank import Joined

    def say(report: Any) -> None:
        if not isinstance(report, Joined):
            print(report.line(steps), flush=True)
        elif report.done:
            print(f"rank {report.rank} goes on after step {report.done}, node {report.node[:8]}", flush=True)
        else:
            print(f"rank {report.rank} on node {report.node[:8]}", flush=True)

    return say


def main() -> int:
    given, options = parse()
    from labs.concurrency.cluster import Cluster, unavailable

    if missing := unavailable():
        print(f"labs.cluster: {missing}", file=sys.stderr)
        return 2
    import ray
    import torch

    from labs.cluster.launch import fit
    from labs.machine import usable_cores
    from labs.unrecorded import Unrecorded

    with ExitStack() as stack:
        if address := given.address or os.environ.get("RAY_ADDRESS"):
            os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
            try:
                ray.init(address, log_to_driver=False, logging_level="ERROR")
            except (ConnectionError, ValueError) as error:
                print(f"labs.cluster: no cluster at {address!r}: {error}", file=sys.stderr)
                return 2
            stack.callback(ray.shutdown)
        else:
            gpus = torch.cuda.device_count() if options.backend == "nccl" else 0
            workers = max(given.ranks, usable_cores())
            stack.callback(Cluster(workers, Unrecorded(time.perf_counter), gpus).close)
        storage = given.storage or stack.enter_context(tempfile.TemporaryDirectory(prefix="perflab-train-"))
        try:
            fit(
                options,
                given.ranks,
                spread=given.spread,
                failures=given.failures,
                storage=storage,
                say=_say(options.steps),
            )
        except ValueError as error:
            print(f"labs.cluster: {error}", file=sys.stderr)
            return 2
        except RuntimeError as error:
            print(f"labs.cluster: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
