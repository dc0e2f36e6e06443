"""``torchrun -m labs.X``: its ranks are the world that the lab is measured with."""

import subprocess
import sys
import textwrap

import pytest

HANGS = """
import subprocess, sys, time
from bench.world import protocol, torchrun

protocol.GRACE_SECONDS = 0.5
store = protocol.open_store()
runner = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
with torchrun._stopping(store.port, runner):
    time.sleep(90)
"""


def test_a_rank_0_that_hangs_ends_with_the_runners_status():
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 3, done.stderr
    assert "perflab: rank 0 hangs in its step and is ended" in done.stderr


@pytest.mark.proof
@pytest.mark.timeout(240)
def test_torchrun_starts_a_lab_whose_ranks_are_the_world(tmp_path, calibrated):
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
        sys.executable,
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
