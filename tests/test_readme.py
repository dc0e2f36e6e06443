"""The README is true: its commands run, word for word, and its figures come from the committed results.

The quick commands run in ``make test``; those that measure for long, and the two make targets in a
fresh clone, run in ``make proof``.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.report.units import format_seconds
from bench.suites.kernel_table import Row

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
LONG = (
    "perflab run",
    "perflab calibrate",
    "perflab profile",
    "perflab diagnose",
    "pytest",
    "torchrun",
    "python -m",
)


def blocks(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


BLOCKS = [[line for line in block.splitlines() if line.strip()] for block in blocks("console")]
COMMANDS = [command for block in BLOCKS for command in block]
SWAPPED = "python swap_kernels.py"  # has a test of its own
COMPILES = re.compile(r"perflab inspect (\S+) --target (\S+)")  # anew each time, for seconds or minutes
QUICK = [
    [line for line in block if not line.startswith(LONG) and line != SWAPPED and not COMPILES.match(line)]
    for block in BLOCKS
]
SLOW = [
    block
    for block in BLOCKS
    if any(line.startswith(LONG) or line == SWAPPED or COMPILES.match(line) for line in block)
]


@pytest.fixture
def folder(tmp_path, finished_run):
    """A user's folder: the README's files, and the results of a run."""
    for source in blocks("python"):
        name = re.match(r"# (\S+\.py)\n", source)
        assert name, f"a Python block of the README does not begin with its file name: {source[:40]!r}"
        (tmp_path / name[1]).write_text(source)
    shutil.copy(finished_run[0] / "results.json", tmp_path)
    (tmp_path / "bench").symlink_to(ROOT / "bench")
    return tmp_path


def run(command, folder, timeout, **variables):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, **variables}
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def test_every_kind_of_command_is_shown():
    for word in (
        "perflab list",
        "perflab doctor",
        "perflab report",
        "perflab compare",
        "perflab run",
        "torchrun",
    ):
        assert any(command.startswith(word) for command in COMMANDS), word


def run_in_order(block, folder, timeout):
    """The lines of a block as a reader types them: one after the other, in one folder."""
    for command in block:
        # The doctor says how busy this machine is, which is not the README's fault.
        run(command + " || test $? = 1" * (command == "perflab doctor"), folder, timeout)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("block", [pytest.param(block, id=block[0]) for block in QUICK if block])
def test_quick_commands(block, folder):
    run_in_order(block, folder, 100)


def test_what_is_inspected_is_there(in_process, monkeypatch):
    """The short form: the command takes the line, and there is a kernel of that operation for that target. It
    is compiled where the operation is tested."""
    from kernels.ahead_of_time import shipped

    asked = []
    monkeypatch.setattr("bench.inspection._on_cpu", lambda name, as_json: asked.append((name, "cpu")) or 0)
    monkeypatch.setattr(
        "bench.inspection._on_gpu", lambda name, target, as_json: asked.append((name, target)) or 0
    )
    lines = [line for line in COMMANDS if COMPILES.match(line)]
    assert len(lines) >= 2
    for line in lines:
        assert in_process(*shlex.split(line)[1:])[0] == 0, line
    assert asked == [COMPILES.fullmatch(line).groups() for line in lines]
    assert all(shipped(name, target) for name, target in asked if target != "cpu")


COUNTING = """
import atexit
from torch.utils._python_dispatch import TorchDispatchMode

class Counting(TorchDispatchMode):
    calls = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "perflab":
            self.calls.add(func.name().removeprefix("perflab::"))
        return func(*args, **(kwargs or {}))

Counting().__enter__()
atexit.register(lambda: print(*sorted(Counting.calls)))
"""


@pytest.mark.timeout(300)
def test_the_swapped_kernels_are_what_runs(folder):
    """Forward and backward; those that the README names as left to torch are. One step of each is enough."""
    program = folder / SWAPPED.removeprefix("python ")
    text = program.read_text()
    assert "range(5)" in text
    program.write_text(text.replace("range(5)", "range(1)"))
    (folder / "counting").mkdir()
    (folder / "counting" / "sitecustomize.py").write_text(COUNTING)  # imported when Python starts
    said, calls = run(SWAPPED, folder, 200, PYTHONPATH="counting").stdout.splitlines()
    assert re.fullmatch(r"loss [\d.]+ and [\d.]+; step \d+ ms and \d+ ms", said)
    found = set(calls.split())
    assert {"attention", "attention_backward", "gelu_tanh", "gelu_tanh_backward"} <= found
    assert any(name.startswith("cross_entropy") for name in found)
    assert not any("norm" in name for name in found)


@pytest.mark.proof
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("block", [pytest.param(block, id=block[0]) for block in SLOW])
def test_slow_commands(block, folder, measured):
    run_in_order(block, folder, 2400)  # all suites together take more than a quarter of an hour


@pytest.mark.proof
@pytest.mark.timeout(2400)
def test_the_two_make_targets_in_a_fresh_clone(tmp_path, measured):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True, timeout=60)
    for target in re.findall(r"^(make \w+)", blocks("make")[0], re.MULTILINE):
        done = subprocess.run(target.split(), cwd=clone, capture_output=True, text=True, timeout=1100)
        assert done.returncode == 0, f"{target}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert (clone / "results.html").exists()


def test_labs_in_the_table_exist_with_their_questions():
    from labs import NAMES, load

    rows = re.findall(r"^\| (.+?) \| \[(\w+)\]\((.+?)\) \| `(.+?)` \|$", README, re.MULTILINE)
    assert [row[1] for row in rows] == list(NAMES)
    for question, name, path, command in rows:
        assert load(name).question == question
        assert (ROOT / path).exists()
        assert command == f"perflab run {name}"


def figures(results):
    """The README's lines about the committed results."""
    perflab = results["perflab"]
    where = f"{perflab['machine']['name']}, {perflab['seconds']:.0f} s in all"
    yield f"From [docs/results.json](docs/results.json): `{perflab['command']}` on {where}."
    yield ""
    yield "| lab | times predicted | half of them within | off by more than 2x | proofs | claims that hold |"
    yield "|---|--:|--:|--:|--:|--:|"
    for name, lab in perflab["labs"].items():
        times = lab["summary"]
        passed = sum(check["passed"] for check in lab["checks"])
        held = sum(claim["verdict"] == "holds" for claim in lab["claims"])
        factor = 2 ** times["median_abs_log2"]
        cells = [name, times["times"], f"{factor:.2f}x", times["off"]]
        cells += [f"{passed} of {len(lab['checks'])}", f"{held} of {len(lab['claims'])}"]
        yield f"| {' | '.join(map(str, cells))} |"


def test_every_lab_of_the_committed_results_has_its_pictures():
    labs = json.loads((ROOT / "docs" / "results.json").read_text())["perflab"]["labs"]
    assert {name: lab["figure_error"] for name, lab in labs.items() if not lab["figures"]} == {}


def test_figures_are_those_of_the_committed_results():
    results = json.loads((ROOT / "docs" / "results.json").read_text())
    block = README.split("<!-- figures -->\n")[1].split("<!-- /figures -->")[0]
    assert block.strip() == "\n".join(figures(results))


def kernel_figures(saved):
    """The README's lines about the committed run of bench/suites/test_kernels.py."""
    found = [entry["extra_info"]["row"] for entry in saved["benchmarks"] if "row" in entry["extra_info"]]
    rows = [Row(**row) for row in found]
    assert {row.allocator for row in rows} == {"default", "tuned"}
    yield (
        f"From [docs/kernels.json](docs/kernels.json), {machine_of(saved)}, float32; speed-up over the "
        "fastest peer with its 95 % interval, with glibc's default allocator and with one that keeps its "
        "memory:"
    )
    yield ""
    yield "| operation | default | tuned | fastest peer (tuned) | of its limit (tuned) | aim |"
    yield "|---|--:|--:|---|--:|---|"
    for name in dict.fromkeys(row.name for row in rows):
        columns = {row.allocator: row for row in rows if row.name == name}
        tuned = columns["tuned"]
        speedups = [speedup(columns[mode]) for mode in ("default", "tuned")]
        limit = "; ".join(filter(None, [tuned.of_limit, tuned.memory]))
        aim = f"{tuned.target:.2f}x" if tuned.target is not None else ""
        yield f"| {' | '.join([name, *speedups, tuned.peer, limit, aim])} |"


def left_to_torch(measured):
    """The README's lines about kernels/crossover.json: below which size the public functions call torch."""
    from kernels.spec import NEVER  # imported here: it takes torch

    elements = measured["elements"]["cpu"]
    sizes = ", ".join(f"{name} {count:,}" for name, count in elements.items() if 0 < count < NEVER)
    always = ", ".join(name for name, count in elements.items() if count == NEVER)
    yield (
        "On the CPU the public functions leave to torch's own operation what has fewer elements than "
        f"([kernels/crossover.json](kernels/crossover.json), measured where it says): {sizes}; and "
        f"everything: {always}."
    )


def machine_of(saved):
    machine = saved["machine_info"]
    return f"{machine['cpu']['brand_raw']}, {machine['perflab']['usable_cores']} cores"


def speedup(row):
    return f"{row.speedup:.2f}x ({row.low:.2f} to {row.high:.2f})"


def test_kernel_figures_are_those_of_the_committed_run():
    saved = json.loads((ROOT / "docs" / "kernels.json").read_text())
    block = README.split("<!-- kernels -->\n")[1].split("<!-- /kernels -->")[0]
    assert block.strip() == "\n".join(kernel_figures(saved))


def parallel_figures(saved):
    """The README's lines about the committed run of bench/suites/test_parallel.py: two ranks, and of more
    the largest tensor."""
    lines = [entry["extra_info"]["line"] for entry in saved["benchmarks"] if "line" in entry["extra_info"]]
    largest = max(line.get("bytes", 0) for line in lines)
    yield (
        f"From [docs/parallel.json](docs/parallel.json), {machine_of(saved)}; speed-up over the peer with "
        "its 95 % interval:"
    )
    yield ""
    yield "| ours | its time | against | its time | speed-up | aim |"
    yield "|---|--:|---|--:|--:|---|"
    for line in lines:
        if line["ranks"] == 2 or line.get("bytes") == largest:
            times = [format_seconds(line[side]) for side in ("seconds", "peer_seconds")]
            ratio = f"{line['ratio']:.2f}x ({line['low']:.2f} to {line['high']:.2f})"
            aim = f"{line['aim']:.2f}x" if line["aim"] is not None else ""
            yield f"| {' | '.join([line['name'], times[0], line['peer'], times[1], ratio, aim])} |"


def test_parallel_figures_are_those_of_the_committed_run():
    """No table without a run."""
    path = ROOT / "docs" / "parallel.json"
    block = README.split("<!-- parallel -->\n")[1].split("<!-- /parallel -->")[0]
    assert block.strip() == (
        "\n".join(parallel_figures(json.loads(path.read_text()))) if path.exists() else ""
    )


def test_what_is_left_to_torch_is_as_measured():
    saved = json.loads((ROOT / "kernels" / "crossover.json").read_text())
    block = README.split("<!-- crossover -->\n")[1].split("<!-- /crossover -->")[0]
    assert block.strip() == "\n".join(left_to_torch(saved))


def test_links_lead_somewhere():
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path
