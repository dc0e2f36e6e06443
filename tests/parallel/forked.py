"""What the fork server of ``ranks.py`` imports, so that every rank is born with it.

That is what takes longest to import, all of ``parallel``, and numba ready to compile, which would take each
rank another 0.3 s.
"""

import contextlib
import gc
import importlib
import os
import sys
from pathlib import Path

from numba.core.registry import cpu_target

LARGE = (
    *("torch", "torch.distributed", "numpy", "hypothesis", "pytest", "ranks"),
    *("torch._dynamo", "torch.distributed.optim", "torch.distributed.pipelining"),
    "torch.distributed.checkpoint",
)

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
OURS = sorted(f"parallel.{path.stem}" for path in (ROOT / "parallel").glob("[!_]*.py"))

for name in (*LARGE, *OURS, "kernels.optimizer"):
    with contextlib.suppress(ImportError):  # a GPU machine may lack hypothesis
        importlib.import_module(name)
cpu_target.target_context.refresh()
words = os.environ.get("PYTHONPATH", "").split(os.pathsep)
os.environ["PYTHONPATH"] = os.pathsep.join(word for word in words if word != str(Path(__file__).parent))
gc.freeze()  # else each collection of a rank goes through a million objects of modules: 0.2 s
