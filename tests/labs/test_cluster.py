"""labs.cluster: Ray's ranks train what torchrun's do, over two nodes, and go on after one is lost."""

import os
import signal
import subprocess
import sys
import tempfile
import threading

import psutil
import pytest
from left_running import children, left_running

from labs.cluster import launch
from labs.cluster.__main__ import parse
from labs.cluster.rank import Joined, Reports
from labs.concurrency import cluster as local
from labs.train.options import Options

SMALL = dict(strategy="ddp", width=32, layers=1, heads=2, length=16, batch=4, learning_rate=3e-3)
NO_RAY = pytest.mark.skipif(bool(local.unavailable()), reason="Ray is not installed")
PATIENCE_S = 60.0


class TwoNodes:
    """A head with two processors and, in a test, a second node with one, on this machine."""

    def __init__(self):
        import ray
        from ray.cluster_utils import Cluster

        self.before = children()
        head = dict(num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20)
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        ray.init(address=self.cluster.address, log_to_driver=False, logging_level="ERROR")
        self.head_id = ray.get_runtime_context().get_node_id()

    def bring_a_second(self):
        """Its id."""
        self.second = self.cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        return self.second.node_id

    def lose_the_second(self):
        self.cluster.remove_node(self.second, allow_graceful=False)

    def close(self):
        import ray

        ray.shutdown()
        self.cluster.shutdown()


@pytest.fixture(scope="module")
def two_nodes():
    """All that Ray writes lies in a folder of its own, also the address that a bare ray.init() would find."""
    # A socket's path has to be shorter than 108 bytes, and pytest's folders are long.
    with (
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        nodes = TwoNodes()
        yield nodes
        pids = children() - nodes.before
        nodes.close()
        assert left_running(pids) == []


def by_torchrun(ranks, options, folder):
    """Losses of the same training under torchrun, from the lines that it prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "labs.train"]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.split()[3] for line in done.stdout.splitlines() if line.startswith("step")]


@pytest.mark.ray
@NO_RAY
def test_what_ranks_reported_outlives_their_node(two_nodes):
    """The short form: a task on the second node in place of a rank, and no training."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    second = two_nodes.bring_a_second()
    there = NodeAffinitySchedulingStrategy(second, soft=False)
    reports = launch.reports_actor()

    @ray.remote(num_cpus=1, scheduling_strategy=there)
    def report(rank):
        node = ray.get_runtime_context().get_node_id()
        ray.get(reports.add.remote(Joined(rank, node, 0)))

    ray.get(report.remote(1), timeout=PATIENCE_S)
    with pytest.raises(ValueError, match="--ranks 4 needs as many CPUs; this cluster has 3"):
        launch.fit(Options(**SMALL), 4, storage="nowhere")
    two_nodes.lose_the_second()
    assert ray.get(reports.since.remote(0), timeout=PATIENCE_S) == [Joined(1, second, 0)]
    assert second != two_nodes.head_id


@pytest.mark.proof
@pytest.mark.ray
@pytest.mark.timeout(300)
@NO_RAY
def test_ray_trains_over_two_nodes_what_torchrun_trains_and_goes_on_after_a_loss(two_nodes, tmp_path):
    """One node is killed early on; both ranks then fit on the other, and go on from the checkpoint. There are
    so many steps that the training cannot be over before the node is gone."""
    two_nodes.bring_a_second()
    steps = 400
    options = Options(**SMALL, steps=steps, checkpoint=str(tmp_path / "kept"), save_every=5, join_timeout=30)
    lost = []

    def say(report):
        if not isinstance(report, Joined) and report.step >= 10 and not lost:
            lost.append(report.step)
            two_nodes.lose_the_second()

    found = launch.fit(options, 2, spread=True, failures=2, storage=str(tmp_path / "ray"), say=say)
    ranks = [each for each in found if isinstance(each, Joined)]
    first, last = ranks[:2], ranks[-2:]
    assert {each.rank for each in first} == {0, 1}
    assert len({each.node for each in first}) == 2, "a rank on each node"
    assert all(each.done == 0 for each in first)
    assert {each.node for each in last} == {two_nodes.head_id}, "the other node is lost"
    assert all(0 < each.done < steps for each in last), "from the checkpoint"
    losses = {each.step: each.loss for each in found if not isinstance(each, Joined)}
    assert sorted(losses) == list(range(1, steps + 1))
    printed = [f"{losses[step]:.4f}" for step in range(1, steps + 1)]
    assert printed == by_torchrun(2, {**SMALL, "steps": steps}, tmp_path)


INTERRUPTED = """
import sys, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background starts with it ignored
sys.argv = ["labs.cluster", *sys.argv[1:]]
from labs.cluster.__main__ import main
raise SystemExit(main())
"""


@pytest.mark.proof
@pytest.mark.ray
@pytest.mark.timeout(200)
@NO_RAY
def test_ctrl_c_leaves_no_process_behind(tmp_path):
    command = [sys.executable, "-c", INTERRUPTED, "--ranks", "1", "--steps", "100000", "--width", "32"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for line in run.stdout:
            if line.startswith("step 2/"):
                break
        below = [each.pid for each in psutil.Process(run.pid).children(recursive=True)]
        assert len(below) >= 3
        run.send_signal(signal.SIGINT)
        run.wait(PATIENCE_S)
        assert left_running(below) == []
    finally:
        run.kill()
        run.stdout.close()


# --- what needs no cluster -------------------------------------------------------------------------


def test_reports_are_kept_in_order():
    reports = Reports()
    for rank in range(3):
        reports.add(Joined(rank, "node", 0))
    assert reports.since(1) == [Joined(1, "node", 0), Joined(2, "node", 0)]
    assert reports.since(3) == []


def test_a_rank_that_is_started_again_is_known():
    reports = Reports()
    assert [reports.begin(rank) for rank in (0, 1, 0, 1, 2)] == [False, False, True, True, False]


def test_failures_do_not_go_on_from_another_runs_checkpoint(tmp_path):
    (tmp_path / "step-7-1").mkdir()
    kept = dict(checkpoint=str(tmp_path))
    with pytest.raises(ValueError, match="has checkpoints of another run"):
        launch.check(Options(**SMALL, **kept), 2, failures=1)
    launch.check(Options(**SMALL, **kept, resume=True), 2, failures=1)
    launch.check(Options(**SMALL, **kept), 2, failures=0)


class Asked:
    """In place of the actor: what it is asked for is what ``ray.get`` is given."""

    def __init__(self):
        self.since = self

    def remote(self, seen):
        return seen


@pytest.mark.ray
@NO_RAY
@pytest.mark.parametrize(
    ("errors", "lost"), [(["GetTimeoutError"] * 2, 0), (["GetTimeoutError", "RaySystemError"], 1)]
)
def test_a_cluster_that_answers_late_loses_no_report(errors, lost, monkeypatch):
    import ray

    waiting = [getattr(ray.exceptions, name)("late") for name in errors]

    def get(seen, timeout):
        if waiting:
            raise waiting.pop(0)
        ended.set()
        return [Joined(0, "node", 0)][seen:]

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(launch, "POLL_S", 0.001)
    ended, found, gone = threading.Event(), [], []
    launch._follow(Asked(), found, gone, lambda report: None, ended)
    assert len(gone) == lost
    assert found == ([] if lost else [Joined(0, "node", 0)])


def test_the_training_has_all_options_of_torchruns():
    given, options = parse(["--ranks", "3", "--strategy", "fsdp", "--steps", "5", "--spread"])
    assert (given.ranks, given.spread, given.failures) == (3, True, 0)
    assert options == Options(strategy="fsdp", steps=5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--ranks", "0"], "--ranks is 0; it is at least 1"),
        (["--failures", "-1"], "--failures is -1; it is not negative"),
        (["--failures", "2"], "say where with --checkpoint DIR"),
        (["--strategy", "dpp"], "did you mean 'ddp'"),
        (["--batch", "0"], "--batch is 0; it is at least 1"),
    ],
)
def test_wrong_options_are_one_line_and_status_2(given, said, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(given)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(ranks=0), "--ranks is 0"),
        (dict(ranks=1, failures=-1), "--failures is -1"),
        (dict(ranks=1, failures=1), "say where with --checkpoint DIR"),
    ],
)
def test_a_launch_that_cannot_be_is_refused_before_anything_starts(arguments, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        launch.fit(Options(**SMALL), storage=str(tmp_path), **arguments)
