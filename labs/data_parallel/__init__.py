"""What is DP and FSDP? What can be sharded? DP vs DDP? Synchronous computation?

Answer. Data parallel: the same model on every rank, a batch for each, the mean of their gradients. What is
replicated can be sharded: optimizer state (ZeRO-1), gradients too (ZeRO-2), parameters too (ZeRO-3, FSDP),
for up to 1.5 times the bytes on the wire; activations cannot, they are the rank's own. DP is replicas in
threads of one process, which share an interpreter lock and a first device; DDP is a process for each, and an
all-reduce behind backward. Steps are synchronous: all wait for the latest rank, unless they average
parameters now and then (local SGD).

Formulas (``model.py``), for p ranks, N parameters in float32 with AdamW:
  held          single, DDP: 4 N + 4 N + 8 N; ZeRO-1: 4 N + 4 N + 8 N / p; ZeRO-2: 4 N + 12 N / p; FSDP:
                16 N / p; and in each the activations of the rank's batch
  payload       DDP 4 N (all-reduce, which moves twice that); ZeRO-1 8 N; ZeRO-2 8 N (reduce-scatter and
                all-gather, once each); FSDP 12 N (gathered for forward and for backward, and reduced)
  step          compute + communication - overlap
  straggler     compute + (E[max over ranks of the sum of H delays] + exchange) / H

Sources: Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training";
Rajbhandari et al. 2020, "ZeRO", section 5; Zhao et al. 2023, "PyTorch FSDP"; Stich 2018, "Local SGD Converges
Fast and Communicates Little"; Dean and Barroso 2013, "The Tail at Scale".
"""

from __future__ import annotations

from labs.data_parallel.claims import CLAIMS
from labs.data_parallel.config import Config
from labs.data_parallel.figures import figure
from labs.data_parallel.model import memory_bytes, predict
from labs.data_parallel.proof import check
from labs.data_parallel.ways import variants
from labs.lab import Lab

__all__ = ["LAB", "Config"]

LAB = Lab(
    name="data_parallel",
    question="What is DP and FSDP? What can be sharded? DP vs DDP? Synchronous computation?",
    answer=(
        "Data parallel: the same model on every rank, a batch for each, the mean of their gradients. What "
        "ranks replicate can be sharded: optimizer state (ZeRO-1), gradients (ZeRO-2), parameters (FSDP); "
        "activations are each rank's own. DP is threads of one process under one lock, DDP a process each. "
        "Synchronous steps wait for the latest rank; local SGD waits for sums of delays, which "
        "differ less."
    ),
    config=Config,
    predict=predict,
    variants=variants,
    check=check,
    claims=CLAIMS,
    figure=figure,
    memory_bytes=memory_bytes,
    seconds=12.0,
    sources=(
        "Li et al.: PyTorch Distributed: Experiences on Accelerating Data Parallel Training, VLDB 2020",
        "Rajbhandari et al.: ZeRO, SC 2020; Zhao et al.: PyTorch FSDP, VLDB 2023",
        "Stich: Local SGD Converges Fast and Communicates Little, 2018",
        "Dean, Barroso: The Tail at Scale, 2013",
    ),
)
