"""labs.train: every strategy computes what one process does, checkpoints carry over, misfits are named."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_elastic import claimed, free_port

from labs.train.__main__ import main
from labs.train.loop import resume, train
from labs.train.options import STRATEGIES, Options, parse
from labs.train.strategies import build, flops_per_token

CPU = torch.device("cpu")
SMALL = dict(width=32, layers=2, heads=4, length=24, batch=4, learning_rate=3e-3)
EQUAL = [name for name in STRATEGIES if name not in ("expert", "local_sgd", "diloco")]


def losses(strategy, steps, folder="", go_on=False, **sizes):
    """Loss of each step, on this rank of the world that runs."""
    options = Options(
        strategy=strategy, steps=steps, checkpoint=folder, resume=go_on, save_every=100, **{**SMALL, **sizes}
    )
    trainer = build(options, CPU)
    done = resume(options, trainer)
    return [(report.step, report.loss) for report in train(options, trainer, CPU, done)]


def in_background(*arguments):
    return losses(*arguments, background_save=True)


def test_every_strategy_descends_as_one_process_does(ranks):
    (alone,) = ranks.run(1, losses, "single", 4)
    assert [step for step, _ in alone] == [1, 2, 3, 4]
    assert alone[-1][1] < alone[0][1] - 0.3
    for strategy in EQUAL[1:]:
        for found in ranks.run(2, losses, strategy, 4, backend="link"):
            torch.testing.assert_close(found, alone, rtol=1e-5, atol=0, msg=strategy)


def test_experts_compute_the_same_on_any_number_of_ranks(ranks):
    (alone,) = ranks.run(1, losses, "expert", 3)
    for found in ranks.run(2, losses, "expert", 3, backend="link"):
        torch.testing.assert_close(
            found, alone, rtol=1e-3, atol=0
        )  # the balancing loss is of a rank's tokens


def test_local_steps_of_one_are_the_gradient_steps_of_one_rank(ranks):
    (alone,) = ranks.run(1, losses, "single", 3)
    (local,) = ranks.run(1, losses, "local_sgd", 3)
    torch.testing.assert_close(local, alone)
    for strategy in ("local_sgd", "diloco"):
        assert ranks.run(2, losses, strategy, 8)[0][-1][1] < alone[0][1] - 0.3


def after(strategy, steps):
    """The model's parameters, and the bytes that are held of it and of its optimizers."""
    options = Options(strategy=strategy, steps=steps, local_steps=2, **SMALL)
    trainer = build(options, CPU)
    list(train(options, trainer, CPU))
    parameters = [p.detach() for p in trainer.checkpointed.model.parameters()]
    return parameters, trainer.checkpointed.held_bytes()


def test_diloco_overshoots_the_average_by_its_outer_optimizer_and_keeps_two_more_copies(ranks):
    (begun, _), (averaged, held), (stepped, more) = (
        ranks.run(2, after, *way)[0] for way in (("local_sgd", 0), ("local_sgd", 2), ("diloco", 2))
    )
    for start, mean, found in zip(begun, averaged, stepped, strict=True):
        # The first step of SGD with lr 0.7 and Nesterov momentum 0.9 goes 0.7 * (1 + 0.9) as far as the mean.
        torch.testing.assert_close(found - start, 1.33 * (mean - start), rtol=1e-3, atol=1e-6)
    assert more - held == 2 * sum(p.nbytes for p in begun)


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "fsdp", "tensor", "context", "expert"])
def test_a_run_goes_on_at_another_world_size(ranks, tmp_path, strategy):
    whole = ranks.run(2, losses, strategy, 3, backend="link")[0]
    ranks.run(2, losses, strategy, 2, str(tmp_path), backend="link")
    ((step, loss),) = ranks.run(1, losses, strategy, 3, str(tmp_path), True, backend="link")[0]
    assert step == 3
    assert loss == pytest.approx(whole[-1][1], rel=1e-3 if strategy == "expert" else 1e-5)


def test_a_run_goes_on_by_another_strategy(ranks, tmp_path):
    whole = ranks.run(2, losses, "ddp", 3)[0]
    ranks.run(2, in_background, "fsdp", 2, str(tmp_path), backend="link")
    ((_, loss),) = ranks.run(2, losses, "zero2", 3, str(tmp_path), True)[0]
    assert loss == pytest.approx(whole[-1][1], rel=1e-5)


@pytest.mark.parametrize(("strategy", "steps"), [("local_sgd", 3), ("diloco", 7)])
def test_local_models_come_back_to_their_ranks(ranks, tmp_path, strategy, steps):
    """And what the outer optimizer has gathered: the run goes on between two averages, behind the first."""
    whole = ranks.run(2, losses, strategy, steps)
    ranks.run(2, losses, strategy, steps - 1, str(tmp_path))
    assert ranks.run(2, losses, strategy, steps, str(tmp_path), True)[0] == whole[0][steps - 1 :]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--strategy", "dpp"], "did you mean 'ddp'"),
        (["--resume"], "say where with --checkpoint"),
        (["--background-save"], "say where with --checkpoint"),
        (["--batch", "0"], "--batch is 0; it is at least 1"),
        (["--learning-rate", "-1"], "above 0"),
        (["--heads", "3"], "heads=3 does not divide width=128"),
    ],
)
def test_wrong_options_are_one_line_and_status_2(given, said, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(given)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_the_loss_of_experts_is_the_models_without_what_balances_them(ranks):
    for printed, right, minimised in ranks.run(2, loss_and_gradient_of_experts, backend="link"):
        assert printed == right
        assert minimised  # the routers still learn to balance


def loss_and_gradient_of_experts():
    options = Options(strategy="expert", steps=1, **SMALL)
    trainer = build(options, CPU)
    tokens, targets = torch.randint(256, (2, 4, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        right = trainer.call(tokens, targets).item()
    printed = trainer.step(tokens, targets).item()
    gradients = []
    for penalty in (trainer.penalty, lambda: 0.0):
        trainer.optimizer.zero_grad()
        (trainer.call(tokens, targets) + penalty()).backward()
        gradients.append(trainer.checkpointed.model.blocks[0].feed_forward.router.weight.grad)
    return printed, right, not torch.equal(*gradients)


def test_flops_are_those_that_torch_counts(ranks):
    for strategy in ("single", "expert"):
        ((counted, predicted),) = ranks.run(1, flops_of_a_step, strategy)
        assert counted == predicted, strategy


def flops_of_a_step(strategy):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    options = Options(strategy=strategy, steps=1, experts=3, **SMALL)
    trainer = build(options, CPU)
    tokens, targets = torch.randint(256, (2, 4, 24))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the one it counts
        trainer.step(tokens, targets)
    return counter.get_total_flops(), flops_per_token(options) * tokens.numel()


def test_buckets_count_as_memory(ranks):
    """DDP's are its gradients; of ZeRO's stage 2 they stand beside them, two of the largest bucket."""
    ((alone, parameters, peak),) = ranks.run(1, buffers_and_peak, "single")
    assert alone == 0
    assert peak >= 4 * parameters  # with gradients and moments
    for strategy, factor in (("ddp", 1), ("zero2", 1)):
        for buffers, _, peak in ranks.run(2, buffers_and_peak, strategy, backend="link"):
            assert factor * parameters <= buffers <= factor * parameters + 1024, strategy
            least = 4 if strategy == "ddp" else 1 + 1 + 1 / 2 + 2 / 2  # of the rest a rank holds half
            assert peak >= least * parameters, strategy


def buffers_and_peak(strategy):
    """Tokens so few that activations are small beside the model."""
    options = Options(strategy=strategy, steps=2, **{**SMALL, "batch": 2, "length": 2})
    trainer = build(options, CPU)
    parameters = sum(p.nbytes for p in trainer.checkpointed.model.parameters())
    *_, report = train(options, trainer, CPU)
    return trainer.buffer_bytes, parameters, report.peak_bytes


def test_steps_whose_memory_is_counted_say_so(ranks):
    ((first, second, third),) = ranks.run(1, said_of_steps, 3)
    assert first.endswith("(slower: its memory was counted)")
    assert second.endswith("(slower: its memory was counted)")
    assert third.endswith(" ms")


def said_of_steps(steps):
    options = Options(strategy="single", steps=steps, **SMALL)
    return [report.line(steps) for report in train(options, build(options, CPU), CPU)]


def misfit(strategy, sizes):
    try:
        losses(strategy, 1, **sizes)
    except ValueError as error:
        return str(error)


def test_what_does_not_fit_the_ranks_is_named_on_all(ranks):
    for strategy, sizes, said in (
        ("ddp", {"batch": 3}, "batch=3 sequences cannot be shared equally by 2 ranks"),
        ("single", {}, "--strategy single is one process"),
        ("context", {"length": 22}, "--length 22 is no multiple of 4"),
        ("tensor", {"heads": 1}, "--heads 1 cannot be split evenly over 2 ranks"),
        ("hsdp", {"shard_size": 3}, "--shard-size 3 does not divide the 2 ranks"),
    ):
        for text in ranks.run(2, misfit, strategy, sizes):
            assert said in text


def command(rank, port, arguments, world_size=2):
    """(exit status, what stderr gets) of ``python -m labs.train`` as this rank of a world."""
    place = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        sizes = ["--backend", "shm", "--steps", "2", "--width", "32"]
        patch.setattr(sys, "argv", ["labs.train", *sizes, *arguments])
        for name, value in place.items():
            patch.setenv(name, str(value))
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
            return main(), printed.getvalue()


def command_of_ranks(folder, port, arguments):
    """As one of two ranks: whoever comes first is rank 0. (rank, exit status, stderr)."""
    rank = 0 if claimed(Path(folder) / "0") else 1
    return rank, *command(rank, port, arguments[rank])


@pytest.mark.parametrize("alike", [True, False])
def test_what_is_wrong_is_one_line_whichever_rank_finds_it(ranks, tmp_path, alike):
    wrong = ["--batch", "3"]
    found = ranks.run(
        2, command_of_ranks, str(tmp_path), free_port(), [wrong if alike else [], wrong], backend=None
    )
    (_, first, said), (_, second, more) = sorted(found)
    reason = "batch=3 sequences cannot be shared equally by 2 ranks"
    assert second == 2
    assert first == (2 if alike else 1)
    who = "" if alike else "rank 1 of 2 .* raised ValueError: "
    assert re.fullmatch(rf"labs\.train: {who}{reason}.*\n", said), said
    assert more == ""


@pytest.mark.parametrize(
    ("world_size", "status", "said"),
    [("two", 2, "WORLD_SIZE is an integer of at least 1"), (2, 1, "rank 1 of 2 did not join within 0.5 s")],
)
def test_ranks_that_do_not_find_each_other_say_so_in_one_line(world_size, status, said):
    found, printed = command(0, free_port(), ["--join-timeout", "0.5"], world_size)
    assert found == status
    assert re.fullmatch(rf"labs\.train: {said}.*\n", printed), printed


LINE = re.compile(
    r"step (\d)/4  loss ([\d.]+)  [\d,]+ tokens/s  MFU .*  communicated [\d.]+ MB  peak memory [\d.]+ MB  "
    r"exposed [\d.]+ of [\d.]+ ms(  \(slower: its memory was counted\))?"
)


def test_the_command_prints_a_line_a_step_and_survives_a_kill(ranks, tmp_path):
    """The one that users type, over shared memory; rank 1 is killed once, and torchrun starts both again.
    Every loss, before and after, is that of a run that nobody disturbs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "2", "-m", "labs.train", "--strategy", "fsdp", "--backend", "shm"]
    command += ["--steps", "4", "--save-every", "1", "--width", "32", "--layers", "2", "--length", "24"]
    command += ["--checkpoint", str(tmp_path / "kept"), "--resume"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    lines = []
    try:
        for line in run.stdout:
            lines.append(line.rstrip())
            if line.startswith("step 2/") and not any("resumed" in said for said in lines):
                os.kill(rank_process(run.pid, 1), signal.SIGKILL)
        assert run.wait(60) == 0, run.stderr.read()[-3000:]
    finally:
        run.kill()
    printed = [LINE.fullmatch(line).groups() for line in lines if line.startswith("step")]
    steps = [int(step) for step, *_ in printed]
    assert steps[:2] == [1, 2]
    assert steps[-1] == 4
    expected = dict(ranks.run(2, undisturbed, 4, backend="link")[0])
    for step, loss, *_ in printed:
        assert float(loss) == pytest.approx(expected[int(step)], abs=1e-4)  # printed to four digits
    assert any(line.startswith("resumed after step") for line in lines), lines


def undisturbed(steps):
    return losses("fsdp", steps, width=32, layers=2, length=24, batch=8, learning_rate=1e-3)


def rank_process(agent, rank, seconds=10.0):
    """The process of a rank, of those that this agent started."""
    import psutil

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for process in psutil.Process(agent).children():
            if process.environ().get("RANK") == str(rank):
                return process.pid
        time.sleep(0.05)
    raise AssertionError(f"rank {rank} was not found")


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "single"])
def test_every_strategy_runs_over_nccl(strategy):
    """On as many GPUs as there are; with one, what several ranks do to each other is not run."""
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    devices = torch.cuda.device_count()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(devices),
    ]
    command += ["-m", "labs.train", "--strategy", strategy, "--backend", "nccl", "--steps", "3"]
    command += ["--batch", str(8 * devices), "--heads", str(4 * devices), "--width", str(64 * devices)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len([line for line in done.stdout.splitlines() if line.startswith("step")]) == 3


@pytest.mark.gpu
def test_several_gpus():
    """Says in the report of ``make gpu`` whether the strategies met other ranks there."""
    devices = torch.cuda.device_count()
    if devices < 2:
        pytest.skip(f"torch finds {devices} CUDA devices: NCCL between several GPUs was not run")
