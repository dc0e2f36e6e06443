"""The pipeline's runtime against one process: losses and gradients of every schedule."""

import pytest
import torch
from pipelines import alone, batch_of, built, gradients, stages_of

from parallel import schedules

TOLERANCES = {
    torch.float64: dict(rtol=1e-12, atol=1e-13),
    torch.float32: dict(rtol=1e-4, atol=1e-6),
    torch.bfloat16: dict(rtol=2**-4, atol=2**-6),
}


def equals_one_process(name, microbatches, samples, tied, dtype, steps=1):
    pipeline = built(name, microbatches, tied, dtype)
    batches = [batch_of(samples, seed) for seed in range(steps)]
    expected, whole = alone(stages_of(pipeline.schedule.stages, tied, dtype), batches, 1 / steps)
    for number, (batch, loss) in enumerate(zip(batches, expected, strict=True)):
        if number < steps - 1:
            with pipeline.no_sync():
                losses = pipeline.step(*batch, scale=1 / steps)
        else:
            losses = pipeline.step(*batch, scale=1 / steps)
        assert losses.shape == (microbatches,)
        assert losses.sum().item() == pytest.approx(loss, rel=2e-2 if dtype is torch.bfloat16 else 1e-6)
    found = gradients(pipeline)
    assert found.keys() == {
        name for name in whole if int(name.split(".")[0]) in pipeline.schedule.stages_of(pipeline.rank)
    }
    for name, gradient in found.items():
        torch.testing.assert_close(
            gradient, whole[name], msg=lambda text, name=name: f"{name}: {text}", **TOLERANCES[dtype]
        )


@pytest.mark.parametrize("name", schedules.NAMES)
def test_every_schedule_equals_one_process(ranks, name):
    ranks.run(2, equals_one_process, name, 4, 7, True, torch.float64)
