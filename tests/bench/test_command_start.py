"""The command starts in under half a second and loads nothing heavy; the plugin loads nothing at all."""

import resource
import subprocess
import sys

import pytest

HEAVY = ("torch", "jax", "numba", "ray", "triton")
PROBE = """
import sys
from bench import cli
sys.argv = ["perflab", *{arguments!r}]
try:
    cli.main()
except SystemExit as stopped:
    assert stopped.code in (0, None), stopped.code
loaded = [name for name in {heavy!r} if name in sys.modules]
assert not loaded, loaded
"""


@pytest.mark.parametrize("command", ["--help", "list", "report", "compare"])
def test_starts_light(command, finished_run):
    folder, _ = finished_run
    arguments = {
        "report": ["report", "results.json", "--output", "again.html"],
        "compare": ["compare", "results.json", "results.json"],
    }.get(command, [command])
    done = _python("-c", PROBE.format(arguments=arguments, heavy=HEAVY), folder=folder)
    assert done.returncode == 0, done.stderr


@pytest.mark.alone
@pytest.mark.parametrize(
    "command", [["--help"], ["list"], ["report", "--help"], ["compare", "--help"], ["trace", "--help"]]
)
def test_starts_fast(command, tmp_path):
    # The fastest of up to five: a virtual machine's clock varies by half, the work of starting does not.
    assert any(_cpu_seconds(command, tmp_path) < 0.5 for _ in range(5))


def _python(*arguments, folder):
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


def _cpu_seconds(arguments, folder):
    """CPU seconds of one start: what it takes on a machine that does nothing else."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert _python("-m", "bench.cli", *arguments, folder=folder).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_the_plugin_imports_nothing_until_it_is_used(tmp_path):
    (tmp_path / "test_plain.py").write_text(
        "import sys\n"
        "def test_plain():\n"
        "    heavy = ('numpy', 'torch', 'jax', 'numba', 'psutil', 'bench.stats', 'labs')\n"
        "    assert 'bench.plugin' in sys.modules\n"
        "    assert not [name for name in heavy if name in sys.modules]\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout
