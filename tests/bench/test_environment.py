"""bench/environment: what the allocator's modes promise."""

import os
import subprocess
import sys

import pytest

from bench.environment import allocator_environment

FAULTS = """
import resource, torch, kernels
def faults(function, calls):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        function()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / calls
x = torch.randn(8192, 1024)
found = []
for function in (kernels.gelu, torch.nn.functional.gelu):
    faults(lambda: function(x), 3)
    found.append(faults(lambda: function(x), 12))
print(max(found))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's tunables")
def test_large_tensors_of_the_tuned_column_are_not_faulted_in_again():
    environment = {**os.environ, **allocator_environment("tuned")}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    pages = 4 * 8192 * 1024 / os.sysconf("SC_PAGE_SIZE")
    assert float(done.stdout) < pages / 50
