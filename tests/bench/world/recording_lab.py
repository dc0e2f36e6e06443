"""A lab whose ranks record: in the setup, with a text, and in each step the number of the call."""

from dataclasses import dataclass

from labs.lab import Lab, Variant


@dataclass(frozen=True)
class Config:
    pass


def setup(config, recorder):
    import torch.distributed as dist

    recorder.record("rank", dist.get_rank(), "")
    recorder.text("who", f"rank {dist.get_rank()}")
    calls = []

    def step():
        calls.append(None)
        recorder.record("call", len(calls), "")

    return step


LAB = Lab(
    name="recording_lab",
    question="What do ranks record?",
    answer="What they are told to.",
    config=Config,
    variants=lambda config: [Variant("ranks", "record", setup, processes=2)],
    check=lambda config, outputs: [],
)
