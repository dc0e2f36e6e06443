"""What is wrong is a named error on every rank within seconds, and a rank that died is no hang."""

import os
import time

import pytest
import torch.distributed as dist
from pipelines import batch_of, built, loss_of, stages_of
from torch import nn

from parallel import schedules
from parallel.pipeline import Pipeline

SECONDS = 10.0  # in which every rank must have its error


def raised(function):
    """'kind: text' of what ``function`` raises, within SECONDS."""
    begun = time.monotonic()
    try:
        function()
    except (ValueError, TypeError, RuntimeError) as error:
        assert time.monotonic() - begun < SECONDS
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")


def wrong_pipeline(case):
    world_size = dist.get_world_size()
    schedule = schedules.build("1f1b", world_size + (case == "world"), 4)
    stages = stages_of(schedule.stages - (case == "fewer stages"))
    if case == "missing":
        stages[1] = None
    if case == "different" and dist.get_rank():
        schedule = schedules.build("gpipe", world_size, 4)
    if case == "invalid":
        ranks = schedule.ranks[0][::-1], schedule.ranks[1]
        schedule = schedules.Schedule("reversed", schedule.placement, 4, ranks)
    shared = [{0: "0.tokens.weight", 1: "1.head.bias"}] if case == "shared" else None
    if case == "shared by some" and dist.get_rank():
        shared = []
    reduction = "max" if case == "reduction" else "mean"
    return raised(lambda: Pipeline(stages, schedule, loss_of, shared=shared, reduction=reduction))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("world", "'1f1b' is for 3 ranks, and the group has 2; build it with world_size=2"),
        ("fewer stages", "has 2 stages, and 1 were given; cut the model into 2"),
        ("missing", r"stage 1 is this rank's and is a NoneType; it must be a module \(rank 1\)"),
        ("different", "different schedules; build the same one on every rank"),
        ("invalid", "reversed"),
        ("shared", "stage 1 has no parameter '1.head.bias' to share; it has"),
        ("shared by some", "different shared weights.*give them as shared= on every rank"),
        ("reduction", "reduction is 'max'; it is 'mean' or 'sum'"),
    ],
)
def test_pipelines_that_cannot_be(ranks, case, message):
    found = ranks.run(2, wrong_pipeline, case)
    assert len(set(found)) == 1
    with pytest.raises(Exception, match=message):
        raise Exception(found[0])


def wrong_batch(case):
    pipeline = built("1f1b", 4)
    tokens, targets = batch_of(8)
    inputs = {
        "small": (tokens[:3], targets[:3]),
        "none": (None, targets),
        "number": (7, targets),
        "lists": (list(tokens.split(4)), targets),
        "targets": (tokens, targets[:7]),
        "empty": (list(tokens.split([2, 0, 3, 3])), targets),
        "lengths": ((tokens, tokens[:7]), targets),
    }[case]
    error = raised(lambda: pipeline.step(*inputs))
    losses = pipeline.step(tokens, targets)  # and it goes on
    assert losses.isfinite().all()
    return error


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("small", "ValueError: inputs has 3 samples for 4 micro-batches, which need one each"),
        ("none", "ValueError: inputs must be given on the rank of stage 0"),
        ("number", "inputs must be a tensor, a tuple of tensors, or a list of micro-batches"),
        ("lists", "ValueError: inputs is a list of 2 micro-batches; the schedule has 4"),
        (
            "targets",
            r"ValueError: inputs and targets must have the same samples; .* \[2, 2, 2, 2\] and \[2, 2,",
        ),
        ("empty", "ValueError: inputs: micro-batch 1 has no sample"),
        ("lengths", "as many samples each; they have 8, 7"),
    ],
)
def test_wrong_batches(ranks, case, message):
    found = ranks.run(2, wrong_batch, case)
    assert found[0].split(" (rank")[0] == found[1].split(" (rank")[0]
    with pytest.raises(Exception, match=message):
        raise Exception(found[1])


class Fails(nn.Module):
    """Raises, or changes its output, in a micro-batch of one rank's stage."""

    def __init__(self, stage, how, at):
        super().__init__()
        self.stage, self.how, self.at, self.calls = stage, how, at, 0

    def forward(self, x):
        self.calls += 1
        x = self.stage(x)
        if self.calls - 1 != self.at:
            return x
        if self.how == "raise":
            raise ArithmeticError("no good number")
        return {"wider": x.repeat(1, 1, 2), "shape": x[:, :1], "dtype": x.float(), "two": (x, x)}[self.how]


def failing_stage(name, stage, how, at):
    world_size = dist.get_world_size()
    schedule = schedules.build(name, world_size, 4)
    stages = stages_of(schedule.stages, tied=False)
    stages[stage] = Fails(stages[stage], how, at)
    pipeline = Pipeline(stages, schedule, loss_of)
    error = raised(lambda: pipeline.step(*batch_of(8)))
    pipeline.zero_grad()
    losses = pipeline.step(*batch_of(8))  # and it goes on
    assert losses.isfinite().all()
    return error


@pytest.mark.parametrize(
    ("name", "stage", "how", "at", "message"),
    [
        ("1f1b", 0, "raise", 0, r"RuntimeError: ArithmeticError: no good number \(rank 0\)"),
        ("1f1b", 1, "raise", 0, r"ArithmeticError: no good number \(rank 1\)"),
        ("zb_h1", 2, "raise", 3, r"ArithmeticError: no good number \(rank 2\)"),
        ("zb_v", 4, "raise", 2, r"ArithmeticError: no good number \(rank 1\)"),
        (
            "1f1b",
            1,
            "wider",
            2,
            r"ValueError: stage 1 gives \(samples, 3, 12\) float64 for micro-batch 2, and gave "
            r"\(samples, 3, 6\) float64 at first; only the number of samples may change",
        ),
        ("zb_h1", 0, "shape", 1, r"gives \(samples, 1, 6\) float64 for micro-batch 1"),
        ("zb_v", 3, "dtype", 3, r"gives \(samples, 3, 6\) float32 for micro-batch 3"),
        (
            "gpipe",
            0,
            "two",
            1,
            r"gives \(samples, 3, 6\) float64 and \(samples, 3, 6\) float64 for micro-batch 1",
        ),
    ],
)
def test_a_stage_that_fails(ranks, name, stage, how, at, message):
    """The same error on all ranks, however far they are from the one; the pipeline can be used again."""
    found = ranks.run(3, failing_stage, name, stage, how, at)
    assert len(set(found)) == 1
    with pytest.raises(Exception, match=message):
        raise Exception(found[0])


def test_a_stage_that_fails_over_shared_memory(ranks):
    (first, second) = ranks.run(2, failing_stage, "zb_v", 1, "raise", 1, backend="shm")
    assert first == second
    assert "ArithmeticError: no good number (rank 1)" in first


def dying(name, victim, after):
    """The victim ends itself in the midst of a step."""
    pipeline = built(name, 4)
    pipeline.step(*batch_of(8))

    def record(rank, action, start, end):
        if rank == victim and action == pipeline.schedule.actions(rank)[after]:
            os._exit(3)

    return raised(lambda: pipeline.step(*batch_of(8), record=record))


@pytest.mark.parametrize(("name", "victim", "after"), [("1f1b", 2, 3), ("zb_v", 0, 5)])
@pytest.mark.parametrize("backend", ["gloo", "shm"])
def test_a_rank_that_dies(ranks, backend, name, victim, after):
    found = ranks.run(3, dying, name, victim, after, backend=backend, timeout=20.0, expect_death=(victim,))
    for rank, error in enumerate(found):
        if rank != victim:
            assert error.startswith("RankUnreachable: rank ")
            assert "of 3 waited in vain for rank" in error
            assert f"rank {victim} " in error  # whom it lacks, itself or through another one
    assert found[victim] is None


class Replica(nn.Module):
    """Raises in one replica only."""

    def __init__(self, stage, raises):
        super().__init__()
        self.stage, self.raises = stage, raises

    def forward(self, x):
        if self.raises:
            raise ArithmeticError("no good number")
        return self.stage(x)


def failing_replica():
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "pipeline"))
    replicas = mesh.get_group("data")
    stages = stages_of(2)
    stages[1] = Replica(stages[1], replicas.rank() == 1)
    schedule = schedules.build("1f1b", 2, 3)
    pipeline = Pipeline(stages, schedule, loss_of, group=mesh.get_group("pipeline"), replicas=replicas)
    return raised(lambda: pipeline.step(*batch_of(6)))


def test_a_replica_that_fails(ranks):
    for error in ranks.run(4, failing_replica):
        assert "ArithmeticError: no good number (rank 1)" in error


def loss_that_is_none(outputs, targets):
    return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")


def wrong_loss():
    schedule = schedules.build("1f1b", 2, 2)
    pipeline = Pipeline(stages_of(2), schedule, loss_that_is_none)
    return raised(lambda: pipeline.step(*batch_of(2)))


def test_a_loss_of_many_numbers(ranks):
    for error in ranks.run(2, wrong_loss):
        assert "loss gives shape (3,); it must give a tensor of one number" in error
