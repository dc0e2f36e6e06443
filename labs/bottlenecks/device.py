"""Faults of a job on a CUDA device, with their fix: the host waits for it, and copies when it must."""

from __future__ import annotations

from typing import Any

from labs.bottlenecks.job import Job

PRECISION = "bfloat16"
"""Of products: every CUDA device that this is for multiplies it faster."""


def missing() -> str:
    """Why there is no device, or an empty string."""
    import torch

    return "" if torch.cuda.is_available() else "there is no CUDA device here to copy to or to wait for"


def _on_device(job: Job) -> None:
    """Single sequences, whose gradients add up, on the device."""
    job.device = "cuda"
    job.precision = PRECISION
    job.build(job.config)
    job.split = lambda tokens, targets: zip(tokens.split(1), targets.split(1), strict=True)


def copies_and_reads(job: Job) -> None:
    """Each sequence is copied when it is needed, and each loss is read at once: the host waits every time."""
    _on_device(job)
    plain = job.loss_of

    def loss_of(logits: Any, targets: Any) -> Any:
        loss = plain(logits, targets)
        loss.item()
        return loss

    job.loss_of = loss_of


def stays_on_device(job: Job) -> None:
    """Batches are copied beforehand, and nothing is read in a step."""
    _on_device(job)
    job.batches = [(tokens.to(job.device), targets.to(job.device)) for tokens, targets in job.batches]
