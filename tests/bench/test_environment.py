"""What a measuring child is given: idle threads that sleep, and an allocator that keeps its pages."""

import os
import subprocess
import sys

import pytest

from bench.environment import allocator_environment, measuring_environment

AFTER_A_PRODUCT = """
import time, numpy
x = numpy.random.default_rng(0).random((512, 512), dtype=numpy.float32)
for _ in range(3):
    x @ x.T[:, :400].copy()
time.sleep(2e-3)
cpu = time.process_time()
time.sleep(0.05)
print(time.process_time() - cpu)
"""
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


def test_numpys_idle_threads_do_not_spin_on():
    environment = measuring_environment("default", "cpu")
    done = subprocess.run(
        [sys.executable, "-c", AFTER_A_PRODUCT], env=environment, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 5e-3  # of the 25 ms that they take by default


def test_a_users_own_setting_is_kept(monkeypatch):
    monkeypatch.setenv("OPENBLAS_THREAD_TIMEOUT", "24")
    assert measuring_environment("default", "cpu")["OPENBLAS_THREAD_TIMEOUT"] == "24"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's tunables")
def test_large_tensors_of_the_tuned_column_are_not_faulted_in_again():
    environment = {**os.environ, **allocator_environment("tuned")}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    pages = 4 * 8192 * 1024 / os.sysconf("SC_PAGE_SIZE")
    assert float(done.stdout) < pages / 50
