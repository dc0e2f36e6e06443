"""``kernels`` beside the best peer: every line of ``kernels.spec.benchmarks()``, in both allocator columns.

    pytest bench/suites/test_kernels.py --quick

Each line is timed in interleaved rounds in one process, ours against torch eager, torch.compile and the
peers that its family names; the speed-up is against the fastest of them. The allocator is fixed when a
process starts (with glibc's default a large output is page-faulted anew at every call), so the tuned column
is measured by a child process. The table stands at the end of the run.
"""

from __future__ import annotations

from kernels.spec import benchmarks

LINES = benchmarks()
