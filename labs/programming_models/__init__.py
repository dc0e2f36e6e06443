"""What is imperative vs symbolic programming?

Answer. Imperative (eager) code runs each operation when Python reaches it: anything goes, every operation
pays a call and a trip over memory. Symbolic code is first captured as a program (a jaxpr, an FX graph),
which a compiler may fuse and run at once: what is captured has no values, so branches, side effects and
shapes that depend on values are refused, lost or break the graph.

Formulas (``costs.py``, ``payback.py``, and ``cost`` beside each program):
  eager       operations x call + bytes of every operation / bandwidth
  fused       one call + max(bytes of the fused loop / bandwidth, FLOPs / peak)
  crossover   operations x call x bandwidth / bytes of one number in all operations
  break-even  compile time / (eager - compiled)

Ways: eager torch, torch.compile (inductor), torch.export, FX; JAX with and without jit; NumPy; numba; CUDA
graphs where there is CUDA. Each on an elementwise chain from 256 numbers to past the second cache, a
training step, a recurrent loop and a block of the GPT; then four small programs that part them
(``behaviours.py``). What each captured stands in the report, beside the messages of those that refuse
(``refusals.py``).

Sources: Ansel et al. 2024, "PyTorch 2: Faster Machine Learning Through Dynamic Python Bytecode Transformation
and Graph Compilation" (ASPLOS), sections 3 and 4; Reed et al. 2022, "torch.fx", section 4; Frostig, Johnson,
Leary 2018, "Compiling machine learning programs via high-level tracing" (SysML); Lam, Pitrou, Seibert 2015,
"Numba"; Abadi et al. 2016, "TensorFlow", section 3 (why graphs); Agrawal et al. 2019, "TensorFlow Eager".
"""

from __future__ import annotations

from labs.lab import Lab
from labs.programming_models.claims import CLAIMS
from labs.programming_models.config import Config
from labs.programming_models.figures import figure
from labs.programming_models.payback import derive
from labs.programming_models.predictions import memory_bytes, predict
from labs.programming_models.proof import check
from labs.programming_models.ways import variants

__all__ = ["LAB", "Config"]

LAB = Lab(
    name="programming_models",
    question="What is imperative vs symbolic programming?",
    answer=(
        "Imperative code runs each operation as Python reaches it: anything goes, and every operation pays a "
        "call and a trip over memory. Symbolic code is captured first and compiled as a whole: one "
        "call, fused "
        "loops, and a first call that takes seconds. While it is captured there are no values, so a "
        "branch on "
        "one is refused or breaks the graph, side effects are lost, and new shapes are compiled anew."
    ),
    config=Config,
    predict=predict,
    variants=variants,
    check=check,
    derive=derive,
    claims=CLAIMS,
    figure=figure,
    memory_bytes=memory_bytes,
    columns=("tuned",),  # pages that come anew with each temporary would pass for what fusing saves
    seconds=12.0,
    sources=(
        "Ansel et al.: PyTorch 2, ASPLOS 2024, sections 3 and 4; Reed et al.: torch.fx, MLSys 2022, "
        "section 4",
        "Frostig, Johnson, Leary: Compiling machine learning programs via high-level tracing, SysML 2018",
        "Lam, Pitrou, Seibert: Numba, LLVM-HPC 2015",
        "Abadi et al.: TensorFlow, OSDI 2016, section 3; Agrawal et al.: TensorFlow Eager, SysML 2019",
    ),
)
