"""What is an issue with pipeline parallelism and how can we remedy it?

Answer. The bubble: a pipeline fills and drains in every step, and p ranks idle for (p-1)/(m+p-1) of it with
m micro-batches. More micro-batches make it smaller and hold more activations, unless a rank goes backward as
soon as it can (1F1B). Several stages a rank divide it by their number; weight gradients, which nobody waits
for, fill it (zero-bubble). Each remedy has more actions and messages, so that where stages are short the
plain schedule wins: bubble and overhead of an action are two numbers, here predicted together.

Formulas (``model.py``), F = I = W on every stage:
  bubble        GPipe, 1F1B (p-1)/(m+p-1); interleaved, breadth-first (p-1)/(vm+p-1); ZB-H1 (p-1)/(3m+p-1);
                ZB-V, DualPipe-V in turn (p-1)/(6m+p-1); V-Half (3p-5)/(6m+3p-5)
  activations   GPipe m; 1F1B p - rank; ZB-H1 p; ZB-V 2p halves; V-Half p+2 halves
  step          the simulator's, with stage times, links and overhead

Sources: Huang et al. 2019, "GPipe"; Narayanan et al. 2019, "PipeDream", and 2021, "Efficient Large-Scale
Language Model Training on GPU Clusters"; Lamy-Poirier 2023, "Breadth-First Pipeline Parallelism"; Qi et al.
2023, "Zero Bubble Pipeline Parallelism", and 2024, "Pipeline Parallelism with Controllable Memory";
DeepSeek-AI 2024, "DeepSeek-V3 Technical Report".
"""

from __future__ import annotations

from labs.lab import Lab
from labs.pipeline.claims import CLAIMS
from labs.pipeline.config import Config
from labs.pipeline.derived import derive
from labs.pipeline.figures import figure
from labs.pipeline.model import memory_bytes, predict
from labs.pipeline.proof import check
from labs.pipeline.ways import variants

__all__ = ["LAB", "Config"]

LAB = Lab(
    name="pipeline",
    question="What is an issue with pipeline parallelism and how can we remedy it?",
    answer=(
        "The bubble: filling and draining the pipeline leaves p ranks idle for (p-1)/(m+p-1) of a step of m "
        "micro-batches. More micro-batches, several stages a rank (interleaving) and weight gradients put "
        "off into the gaps (zero bubble) shrink it; 1F1B and V-Half bound what that holds in memory. Each "
        "remedy adds actions and messages, so that where stages are short the plain schedule wins."
    ),
    config=Config,
    predict=predict,
    variants=variants,
    check=check,
    derive=derive,
    claims=CLAIMS,
    figure=figure,
    memory_bytes=memory_bytes,
    seconds=16.0,
    sources=(
        "Huang et al.: GPipe, NeurIPS 2019; Narayanan et al.: PipeDream, SOSP 2019",
        "Narayanan et al.: Efficient Large-Scale Language Model Training on GPU Clusters, SC 2021",
        "Lamy-Poirier: Breadth-First Pipeline Parallelism, MLSys 2023",
        "Qi et al.: Zero Bubble Pipeline Parallelism, ICLR 2024; with Controllable Memory, NeurIPS 2024",
        "DeepSeek-AI: DeepSeek-V3 Technical Report, 2024",
    ),
)
