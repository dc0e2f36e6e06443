"""What are common bottlenecks and solutions to them?

Answer. A step that waits for input, loops in Python, calls tiny operators, faults in fresh memory, passes
over memory again and again, keeps too many activations, multiplies in 32 bits, communicates without overlap,
waits for one rank, or has more threads than cores: each leaves its own mark in a profile, from which a
program can name it and foretell the gain. Here each is planted in the same GPT training job, diagnosed from
its recorded profile, and mended.

Formulas (``model.py``): a step's seconds healthy, and what each fault adds to it. The diagnosis
(``bench/diagnosis``) predicts from the faulty profile alone: a cause that takes the share s of the time is
worth a factor of 1/(1-s) (Amdahl 1967).

Sources: Amdahl 1967; Williams et al. 2009, "Roofline"; Chen et al. 2016, "Training Deep Nets with Sublinear
Memory Cost"; Li et al. 2020, "PyTorch Distributed"; Micikevicius et al. 2018, "Mixed Precision Training";
PyTorch's performance tuning guide; the glibc manual, "Malloc Tunable Parameters".
"""

from __future__ import annotations

from labs.bottlenecks.claims import CLAIMS
from labs.bottlenecks.config import Config
from labs.bottlenecks.figures import figure
from labs.bottlenecks.model import derive, memory_bytes, predict
from labs.bottlenecks.proof import check
from labs.bottlenecks.ways import variants
from labs.lab import Lab

__all__ = ["LAB", "Config"]

LAB = Lab(
    name="bottlenecks",
    question="What are common bottlenecks and solutions to them?",
    answer=(
        "Waiting for input, Python in the loop, tiny batches, fresh memory, unfused passes over memory, kept "
        "activations, 32-bit products, communication without overlap, a late rank, too many threads. "
        "Each leaves "
        "its own mark in a profile: the program names it, foretells the gain, and the fix is measured."
    ),
    config=Config,
    predict=predict,
    variants=variants,
    check=check,
    claims=CLAIMS,
    figure=figure,
    memory_bytes=memory_bytes,
    derive=derive,
    columns=("tuned",),  # healthy is: freed memory stays in the process
    seconds=9.0,
    sources=(
        "Amdahl: Validity of the Single Processor Approach, AFIPS 1967",
        "Williams et al.: Roofline, CACM 2009; Micikevicius et al.: Mixed Precision Training, ICLR 2018",
        "Chen et al.: Training Deep Nets with Sublinear Memory Cost, 2016",
        "Li et al.: PyTorch Distributed, VLDB 2020; PyTorch's performance tuning guide",
    ),
)
