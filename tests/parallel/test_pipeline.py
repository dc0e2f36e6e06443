"""Pipelines against one process: losses and gradients of every schedule; bytes as predicted."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from pipelines import LENGTH, WIDTH, alone, batch_of, built, gradients, loss_of, stages_of
from torch import nn

from parallel import link, schedules
from parallel.pipeline import Pipeline
from parallel.pipeline_batch import split_batch
from parallel.pipeline_prediction import boundaries_of, predict_communication

TOLERANCES = {
    torch.float64: dict(rtol=1e-12, atol=1e-13),
    torch.float32: dict(rtol=1e-4, atol=1e-6),
    torch.bfloat16: dict(rtol=2**-4, atol=2**-6),
}


def check_gradients(pipeline, whole, dtype=torch.float64):
    """Those of this rank's stages are there, and are those of one process."""
    mine = pipeline.schedule.stages_of(pipeline.rank)
    found = gradients(pipeline)
    assert found.keys() == {name for name in whole if int(name.split(".")[0]) in mine}
    for name, gradient in found.items():
        torch.testing.assert_close(
            gradient, whole[name], msg=lambda text, name=name: f"{name}: {text}", **TOLERANCES[dtype]
        )


def equals_one_process(name, microbatches, samples, tied, dtype, steps=1):
    pipeline = built(name, microbatches, tied, dtype)
    batches = [batch_of(samples, seed) for seed in range(steps)]
    expected, whole = alone(stages_of(pipeline.schedule.stages, tied, dtype), batches, 1 / steps)
    near = 2e-2 if dtype is torch.bfloat16 else 1e-6
    for batch, loss in zip(batches[:-1], expected, strict=False):
        with pipeline.no_sync():
            assert pipeline.step(*batch, scale=1 / steps).sum().item() == pytest.approx(loss, rel=near)
    losses = pipeline.step(*batches[-1], scale=1 / steps)
    assert losses.shape == (microbatches,)
    assert losses.sum().item() == pytest.approx(expected[-1], rel=near)
    check_gradients(pipeline, whole, dtype)
    held = schedules.peak_activations(pipeline.schedule)[pipeline.rank]
    assert pipeline.peak_in_flight == held
    assert pipeline.early == (0 if not tied or pipeline.schedule.stages > 1 else microbatches)


@pytest.mark.parametrize("name", schedules.NAMES)
def test_every_schedule_equals_one_process(ranks, name):
    ranks.run(2, equals_one_process, name, 4, 7, True, torch.float64)


@pytest.mark.parametrize(
    ("world_size", "arguments"),
    [
        (1, ("zb_v", 3, 3, True, torch.float64)),
        (3, ("zb_h1", 5, 11, True, torch.float64, 2)),
        (4, ("dualpipe_v", 8, 9, True, torch.float64, 3)),
        (4, ("zb_v", 16, 16, False, torch.float32)),
        (2, ("1f1b", 1, 1, True, torch.float64)),
        (2, ("zb_h1", 4, 4, True, torch.bfloat16)),
    ],
)
def test_worlds_accumulation_and_dtypes(ranks, world_size, arguments):
    ranks.run(world_size, equals_one_process, *arguments)


@pytest.mark.parametrize("backend", ["shm", "link"])
def test_other_backends(ranks, backend):
    ranks.run(2, equals_one_process, "zb_v", 4, 7, True, torch.float64, 2, backend=backend)


@pytest.mark.proof
@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("name", schedules.NAMES)
def test_equals_one_process_whole_grid(ranks, world_size, name):
    for microbatches, tied, dtype, steps in itertools.product(
        (1, 2, 3, 5, 8, 16), (True, False), TOLERANCES, (1, 2)
    ):
        ranks.run(world_size, equals_one_process, name, microbatches, microbatches + 3, tied, dtype, steps)


def trains_and_evaluates(name):
    """Parameters stay those of one process over steps of batches of changing sizes, given in any form."""
    pipeline = built(name, 3)
    stages = nn.ModuleList(stages_of(pipeline.schedule.stages))
    ours = torch.optim.AdamW(pipeline.parameters(), 1e-2)
    theirs = torch.optim.AdamW(stages.parameters(), 1e-2)
    for number, samples in enumerate((7, 3, 12, 7)):
        tokens, targets = batch_of(samples, number)
        x = tokens
        for stage in stages:
            x = stage(x)
        expected = loss_of(x, targets)
        assert pipeline.evaluate(tokens, targets).sum().item() == pytest.approx(expected.item(), rel=1e-12)
        if number == 2:
            sizes = (1, 7, 4)
            tokens, targets = list(tokens.split(sizes)), list(targets.split(sizes))
        pipeline.step(tokens, targets)
        expected.backward()
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    for stage, module in pipeline.stages.items():
        for (name, one), other in zip(
            module.named_parameters(), stages[int(stage)].parameters(), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("name", ["1f1b", "zb_v"])
def test_training_and_evaluation(ranks, name):
    ranks.run(2, trains_and_evaluates, name)


def only_own_stages(shared):
    """Ranks that build their own stages only name what is shared; it starts as the lowest rank's."""
    schedule, rank = schedules.build("1f1b", 2, 2), dist.get_rank()
    stages = stages_of(2, tied=False)
    whole_stages = stages_of(2, tied=True)
    mine = [stage if index == rank else None for index, stage in enumerate(stages)]
    pipeline = Pipeline(mine, schedule, loss_of, shared=shared)
    batch = batch_of(4)
    _, whole = alone(whole_stages, [batch])
    pipeline.step(*batch)
    check_gradients(pipeline, whole)


def test_shared_weights_by_name(ranks):
    ranks.run(2, only_own_stages, [{1: "1.head.weight", 0: "0.tokens.weight"}])


class Passing(nn.Module):
    """States, a mask without gradient, and a memory that is passed on as it is."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, memory, mask):
        return torch.tanh(self.linear(x)) * mask + memory, memory, mask


class Frozen(nn.Module):
    """Neither parameters nor, as the first stage, gradients."""

    def forward(self, x, mask):
        return 2 * x, x.flip(0), mask


def several_tensors(name):
    torch.manual_seed(0)
    schedule = schedules.build(name, dist.get_world_size(), 4)
    stages = [Frozen(), *(Passing() for _ in range(schedule.stages - 1))]
    stages[-2].requires_grad_(False)
    for stage in stages:
        stage.double()
    x, mask, target = torch.randn(6, WIDTH).double(), torch.rand(6, 1) > 0.3, torch.randn(6, WIDTH).double()

    def loss(outputs, target):
        return (outputs[0] - target).square().mean() + outputs[1].sum() / len(target)

    pipeline = Pipeline(stages, schedule, loss)
    sliced = (torch.tensor_split(one, 4) for one in (x, mask, target))
    whole = 0
    for micro in zip(*sliced, strict=True):
        outputs = micro[:2]
        for stage in stages:
            outputs = stage(*outputs)
        whole = whole + loss(outputs, micro[2]) * len(micro[0]) / 6
    parameters = [one for one in nn.ModuleList(stages).parameters() if one.requires_grad]
    expected = dict(zip(parameters, torch.autograd.grad(whole, parameters), strict=True))
    assert pipeline.step((x, mask), target).sum().item() == pytest.approx(whole.item(), rel=1e-12)
    for one in pipeline.parameters():
        if one.requires_grad:
            torch.testing.assert_close(one.grad, expected[one], **TOLERANCES[torch.float64])
        else:
            assert one.grad is None


@pytest.mark.parametrize(("world_size", "name"), [(3, "zb_h1"), (2, "zb_v"), (3, "1f1b")])
def test_masks_memories_and_frozen_stages(ranks, world_size, name):
    ranks.run(world_size, several_tensors, name)


def on_a_mesh(name):
    """Two pipelines of two stages: as one process with both batches."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "pipeline"))
    pipeline_group, replicas = mesh.get_group("pipeline"), mesh.get_group("data")
    schedule = schedules.build(name, 2, 3)
    stages = stages_of(schedule.stages)
    if replicas.rank():
        with torch.no_grad():
            for one in nn.ModuleList(stages).parameters():
                one.add_(1.0)  # replicas become the first one
    pipeline = Pipeline(stages, schedule, loss_of, group=pipeline_group, replicas=replicas)
    batches = [batch_of(5, seed) for seed in (1, 2)]
    _, whole = alone(stages_of(schedule.stages), batches, 1 / 2)
    pipeline.step(*batches[replicas.rank()])
    check_gradients(pipeline, whole)
    return pipeline.synchronised_bytes


@pytest.mark.parametrize("name", ["1f1b", "zb_v"])
def test_with_data_parallelism(ranks, name):
    ranks.run(4, on_a_mesh, name)


def bytes_are_predicted(name, samples):
    pipeline = built(name, 4)
    schedule = pipeline.schedule
    boundaries = boundaries_of(stages_of(schedule.stages), batch_of(2)[0])
    _, sizes = split_batch(batch_of(samples)[0], 4, "inputs")
    for step in range(2):
        with link.counted() as traffic:
            pipeline.step(*batch_of(samples))
        predicted = predict_communication(
            schedule,
            pipeline.rank,
            boundaries,
            sizes,
            is_first_step=step == 0,
            synchronised=pipeline.synchronised_bytes,
        )
        assert dict(traffic.payload) == predicted
    return predicted, traffic.received


@pytest.mark.parametrize("name", schedules.NAMES)
def test_bytes_are_predicted(ranks, name):
    (first, received), (second, back) = ranks.run(2, bytes_are_predicted, name, 7, backend="link")
    assert (first["send"], second["send"]) == (back, received)
    if name == "1f1b":  # 7 samples of states there, and their gradients back; the shared weight both ways
        meetings = (1 + 2 * 4) * 8 + (1 + 4) * 8
        assert first["send"] == second["send"] == 7 * LENGTH * WIDTH * 8 + 11 * WIDTH * 8 + meetings


def records(name):
    pipeline = built(name, 4)
    found = []
    pipeline.step(*batch_of(4), record=lambda *entry: found.append(entry))
    assert [action for _, action, _, _ in found] == pipeline.schedule.actions(pipeline.rank)
    assert {rank for rank, *_ in found} == {pipeline.rank}
    times = [time for *_, start, end in found for time in (start, end)]
    assert times == sorted(times)


def test_records_every_action_in_order(ranks):
    ranks.run(2, records, "zb_v")


@given(st.integers(1, 40), st.integers(1, 12))
@settings(max_examples=50)
def test_a_batch_is_cut_into_all_of_its_samples(samples, count):
    batch = torch.arange(samples)
    if samples < count:
        with pytest.raises(ValueError, match=f"{samples} samples for {count} micro-batches"):
            split_batch((batch, batch), count, "inputs")
        return
    parts, sizes = split_batch((batch, batch), count, "inputs")
    assert torch.equal(torch.cat([one for one, _ in parts]), batch)
    assert [len(other) for _, other in parts] == sizes
    assert max(sizes) - min(sizes) <= 1
