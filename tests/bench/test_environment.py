"""What a measuring child is given: nothing of one variant's libraries runs on into the next one's time."""

import subprocess
import sys

from bench.environment import measuring_environment

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


def test_numpys_idle_threads_do_not_spin_on():
    environment = measuring_environment("default", "cpu")
    done = subprocess.run(
        [sys.executable, "-c", AFTER_A_PRODUCT], env=environment, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 5e-3  # of the 25 ms that they take by default


def test_a_users_own_setting_is_kept(monkeypatch):
    monkeypatch.setenv("OPENBLAS_THREAD_TIMEOUT", "24")
    assert measuring_environment("default", "cpu")["OPENBLAS_THREAD_TIMEOUT"] == "24"
