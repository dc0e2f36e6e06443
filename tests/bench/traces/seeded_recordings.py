"""Real recordings of small programs by torch.profiler, on the CPU: natural noise between equal work."""

from pathlib import Path

WORKS = ("perceptron", "convolution", "attention")


def program(work: str):
    """A training step of a small model, to be called again and again."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    if work == "perceptron":
        layers = [nn.Linear(128, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 128)]
        model, batch = nn.Sequential(*layers), torch.randn(64, 128)
    elif work == "convolution":
        layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1)]
        model, batch = nn.Sequential(*layers), torch.randn(8, 3, 24, 24)
    else:
        model = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        batch = torch.randn(4, 32, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step():
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    for _ in range(5):
        step()
    return step


def record(step, steps: int):
    """The profiler, with so many steps of a program in it."""
    from torch.profiler import ProfilerActivity, profile, schedule

    plan = schedule(wait=0, warmup=2, active=steps, repeat=1)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, schedule=plan) as profiler:
        for _ in range(steps + 2):
            step()
            profiler.step()
    return profiler


def record_in_turns(folder: Path, work: str, turns: int, steps: int) -> tuple[Path, Path]:
    """Two folders with recordings of the same work, made in turns: base, new, base, new ...

    Files are written at the end: nothing but the work runs between one recording and the next.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second thread would wait for cores that others use
    try:
        step = program(work)
        made = [record(step, steps) for _ in range(2 * turns)]
    finally:
        torch.set_num_threads(threads)
    sides = folder / "base", folder / "new"
    for side in sides:
        side.mkdir(parents=True)
    for number, profiler in enumerate(made):
        profiler.export_chrome_trace(str(sides[number % 2] / f"turn{number:03d}.json"))
    return sides
