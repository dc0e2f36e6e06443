"""What is disaggregated serving? When might we want to avoid it?

Answer. Reading a prompt and writing tokens are different work: one is a long matrix product, the other a
short step that everybody waits for. On one worker a prompt stalls all who write; disaggregated serving gives
each kind its own workers and sends keys and values across. Chunked prefill removes most of the same stall
without sending anything, so that disaggregation is to be avoided with short prompts, long outputs or few
workers (a worker of one kind idles), a slow link, prompts that begin alike, and wherever both limits are
loose.

Formulas (``model.py``, ``costs.py``):
  step   a + r [prompts > 0] + r' [reading anew] + p prompts + b new + c pairs + g earlier
           + s [decodes > 0] + s' [writing anew] + d decodes + e context
           + (r'' if prompts > 0 else s'') log2(1 + rest / 10 ms)
  TTFT, ITL, goodput   the simulator's, which runs the engine itself on a virtual clock with these costs

Three policies on the same engine (``engine.py``, ``policies.py``), live on Ray actors (``actors.py``,
``service.py``) and behind an OpenAI-compatible endpoint (``endpoint.py``, ``perflab serve``).

Sources: Yu et al. 2022, "Orca"; Kwon et al. 2023, "PagedAttention"; Agrawal et al. 2024, "Sarathi-Serve";
Zhong et al. 2024, "DistServe"; Patel et al. 2024, "Splitwise"; Qin et al. 2024, "Mooncake".
"""

from __future__ import annotations

from labs.lab import Lab
from labs.serving.claims import CLAIMS
from labs.serving.config import Config
from labs.serving.derived import derive
from labs.serving.figures import figure
from labs.serving.model import memory_bytes, predict
from labs.serving.proof import check
from labs.serving.ways import variants

__all__ = ["LAB", "Config"]

LAB = Lab(
    name="serving",
    question="What is disaggregated serving? When might we want to avoid it?",
    answer=(
        "Workers that only read prompts and workers that only write tokens, with keys and values sent "
        "across, so that "
        "a prompt never stalls who writes. Chunked prefill on colocated workers removes most of that stall "
        "too: avoid "
        "disaggregation with short prompts, outputs as long as prompts, few workers, a slow link or prompts "
        "that begin alike, where one kind of worker idles or the transfer costs more than it saves."
    ),
    config=Config,
    predict=predict,
    variants=variants,
    check=check,
    derive=derive,
    claims=CLAIMS,
    figure=figure,
    memory_bytes=memory_bytes,
    seconds=22.0,
    sources=(
        "Yu et al.: Orca, OSDI 2022; Kwon et al.: PagedAttention, SOSP 2023",
        "Agrawal et al.: Sarathi-Serve, OSDI 2024",
        "Zhong et al.: DistServe, OSDI 2024; Patel et al.: Splitwise, ISCA 2024",
        "Qin et al.: Mooncake, FAST 2025",
    ),
)
