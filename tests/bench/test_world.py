"""A persistent world of processes: slowest rank's time, errors and hangs that name the rank."""

import subprocess
import textwrap
import time

import numpy as np
import psutil
import pytest
from command import PERFLAB

from bench.world import World, WorldClock, WorldStep


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    before = set(psutil.Process().children(recursive=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(__file__.rsplit("/", 1)[0])  # where world_job.py stands
        made = World(2, answer_seconds=1.0)
        yield made
        made.close()
    assert not set(psutil.Process().children(recursive=True)) - before


def test_every_rank_runs_the_step_and_rank_0_answers(world):
    step = WorldStep(world, "", {}, "world_job:reduce_small")
    assert np.array_equal(step(), np.full(1000, 3.0))
    assert 1e-6 < WorldClock().sample(step, 10) < 1.0
    step.close()


def test_a_sample_is_the_slowest_ranks_time(world):
    step = WorldStep(world, "", {}, "world_job:late_rank")
    assert 0.03 <= step.sample(2) < 0.2


def test_what_rank_0_records_arrives_a_round_at_a_time(world):
    step = WorldStep(world, "recording_lab", {}, "ranks/record")
    assert step.recorded == {"rank": [0.0]}
    step()
    assert step.recorded == {"rank": [0.0], "call": [1.0]}
    step.sample(2)
    step.close()
    assert step.recorded == {"rank": [0.0], "call": [2.0, 3.0]}
    assert step.texts == {"who": "rank 0"}


def test_an_error_names_the_rank_and_the_world_goes_on(world):
    step = WorldStep(world, "", {}, "world_job:raises")
    with pytest.raises(RuntimeError, match=r"rank 1 of 2: ValueError: planted on rank 1"):
        step()
    with pytest.raises(RuntimeError, match="rank 0 of 2"):
        WorldStep(world, "", {}, "world_job:nothing")
    assert WorldStep(world, "", {}, "world_job:reduce_small")() is not None


def test_a_hang_ends_with_who_waits_for_whom(world):
    step = WorldStep(world, "", {}, "world_job:hangs")
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"waits for rank 1 of 2 to answer 'call' world_job:hangs"):
        step()
    assert time.monotonic() - start < 10


@pytest.mark.proof
@pytest.mark.timeout(240)
def test_torchrun_starts_a_lab_whose_ranks_are_the_world(tmp_path):
    (tmp_path / "reduce_lab.py").write_text(
        textwrap.dedent(
            """
            from dataclasses import dataclass
            from labs.lab import Check, Lab, Variant, main, setting

            @dataclass(frozen=True)
            class Config:
                ranks: int = setting(2, unit="processes", help="ranks of the world", minimum=1)

            def reduce(config, recorder):
                import os, torch, torch.distributed as dist
                assert "TORCHELASTIC_RUN_ID" in os.environ
                values = torch.ones(10)
                def step():
                    total = values.clone()
                    dist.all_reduce(total)
                    return total
                return step

            def check(config, outputs):
                return [Check(n, abs(float(o[0]) - config.ranks), 0.0, "sum") for n, o in outputs.items()]

            LAB = Lab("reduce_lab", "What does a reduction cost?", "Little.", Config,
                      lambda config: [Variant("reduce", "gloo", reduce, processes=config.ranks)],
                      check, seconds=0.3)

            if __name__ == "__main__":
                main("reduce_lab")
            """
        )
    )
    command = [
        PERFLAB[0],
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "reduce_lab",
        "--quick",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "What does a reduction cost?" in done.stdout
    assert (tmp_path / "results-reduce_lab.html").exists()
