"""``perflab profile -- COMMAND``: the program runs as it would by itself, and its report is there."""

import fcntl
import os
import pstats
import signal
import subprocess
import sys
import termios
import textwrap

import pytest
from command import PERFLAB, perflab

from bench.profile.launch import TORCHRUN, parse
from bench.traces.load import load

PYTHON = sys.executable


@pytest.fixture
def program(tmp_path):
    """Writes program.py into a folder of its own."""

    def write(text, name="program.py"):
        (tmp_path / name).write_text(textwrap.dedent(text))
        return tmp_path

    return write


def plain(folder, *words):
    done = subprocess.run([PYTHON, *words], cwd=folder, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def profiled(folder, *words, options=()):
    status, out, err = perflab("profile", *options, "--", PYTHON, *words, folder=folder)
    ours = [line for line in err.splitlines() if line.startswith("perflab: ")]
    rest = [line for line in err.splitlines() if not line.startswith(("perflab: ", "USDT"))]
    return status, out, "".join(f"{line}\n" for line in rest), ours


WHAT_IT_SEES = """
    import os, pickle, sys, threading
    class Kept: pass
    print(sys.argv, sys.path[0], __name__, __file__, __package__, sys.flags.optimize, os.getcwd())
    print(__spec__ and __spec__.name, type(__builtins__), type(__loader__).__name__)
    print(sys.modules["__main__"].Kept is Kept, type(pickle.loads(pickle.dumps(Kept()))) is Kept)
    print(sys.stdin.read())
    thread = threading.Thread(target=lambda: print("thread", Kept.__module__), daemon=False)
    thread.start()
    import atexit
    atexit.register(lambda: print("at exit", __name__, pickle.dumps(Kept) != b""))
"""


@pytest.mark.parametrize(
    "words",
    [
        ("program.py", "a", "--b", "-c"),
        ("-O", "./program.py"),
        ("-m", "program", "x"),
        ("-c", "import sys; print(sys.argv, repr(sys.path[0]), __name__)", "y"),
    ],
)
def test_the_program_sees_what_it_would_see(program, words):
    folder = program(WHAT_IT_SEES)
    alone = plain(folder, *words)
    assert alone[0] == 0, alone[2]
    assert profiled(folder, *words)[:3] == alone


@pytest.mark.parametrize(
    "ending",
    [
        "raise RuntimeError('broken')",
        "raise SystemExit(7)",
        "import sys; sys.exit('a message')",
        "raise KeyboardInterrupt",
        "import sys; sys.excepthook = lambda *e: print('hooked', e[0].__name__, file=sys.stderr); 1 / 0",
        "def f(:",
    ],
)
def test_it_ends_as_it_would_end_and_its_report_is_written(program, ending):
    folder = program(f"def work():\n    return sum(range(1000))\nwork()\n{ending}\n")
    status, out, err = plain(folder, "program.py")
    assert profiled(folder, "program.py", options=("--output", "reports"))[:3] == (
        128 - status if status < 0 else status,  # -2: ended by SIGINT; a shell says 130
        out,
        err,
    )
    if ending == "def f(:":  # nothing of it ran
        assert not (folder / "reports").exists()
    else:
        functions = {name for _, _, name in pstats.Stats(str(folder / "reports/profile.prof")).stats}
        assert "work" in functions


def as_from_a_shell():
    """Before a command starts: what started the tests may ignore Ctrl-C, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_program_and_its_report_is_written(program, number):
    folder = program(
        """
        import time
        try:
            print("ready", flush=True)
            time.sleep(60)
        finally:
            print("cleaned up", flush=True)
        """
    )
    command = [*PERFLAB, "profile", "--", PYTHON, "program.py"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = subprocess.Popen(command, cwd=folder, preexec_fn=as_from_a_shell, **pipes)
    assert started.stdout.readline() == "ready\n"
    started.send_signal(number)
    out, _ = started.communicate(timeout=30)
    assert started.returncode == 128 + number
    # As without perflab: SIGINT is an exception, SIGTERM's default is none.
    assert out == ("cleaned up\n" if number == signal.SIGINT else "")
    assert (folder / "profile-program" / "profile.prof").exists()


def test_ctrl_c_in_a_terminal_interrupts_once(program):
    """The terminal sends SIGINT to perflab and to the program: perflab must not send it again."""
    folder = program(
        """
        import time
        try:
            print("ready", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            time.sleep(1.0)
            print("not interrupted again", flush=True)
        """
    )
    controller, terminal = os.openpty()
    command = [*PERFLAB, "profile", "--", PYTHON, "program.py"]
    ours = {"stdin": terminal, "stdout": terminal, "stderr": terminal, "start_new_session": True}

    def begin():
        as_from_a_shell()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)  # the terminal is that of the new session

    started = subprocess.Popen(command, cwd=folder, preexec_fn=begin, **ours)
    os.close(terminal)
    seen = b""
    while b"ready" not in seen:
        seen += os.read(controller, 1000)
    os.write(controller, b"\x03")
    while True:
        try:
            seen += os.read(controller, 1000)
        except OSError:  # the other end is closed: all have ended
            break
    os.close(controller)
    assert started.wait(10) == 0
    assert b"not interrupted again" in seen


def test_what_it_forks_writes_no_report_of_its_own(program):
    folder = program(
        """
        import os, sys
        if os.fork() == 0:
            sys.exit(3)
        _, status = os.wait()
        print(os.waitstatus_to_exitcode(status))
        """
    )
    status, out, _, ours = profiled(folder, "program.py")
    assert (status, out) == (0, "3\n")
    assert ours[0] == "perflab: 1 report of cProfile in profile-program: profile.prof"
    assert ours[1] == "perflab: read it with: perflab trace profile-program"


def test_torch_is_recorded_from_its_import_on(program):
    folder = program(
        """
        import os
        os.environ["PERFLAB_TEST"] = "set before the import"
        import torch
        for step in range(3):
            with torch.profiler.record_function(f"ProfilerStep#{step}"):
                torch.mm(torch.ones(64, 64), torch.ones(64, 64))
        import sys
        assert "torch._inductor" not in sys.modules  # the compiler, which takes seconds
        assert "_inductor" in torch._lazy_modules  # and is there for who asks
        import torch.profiler
        with torch.profiler.profile() as own:  # it may profile itself
            torch.relu(torch.ones(3))
        print([event.key for event in own.key_averages() if event.key == "aten::relu"])
        """
    )
    status, out, _, ours = profiled(folder, "program.py")
    assert (status, out) == (0, "['aten::relu']\n")
    assert "the program starts torch.profiler by itself: perflab's record ends there" in ours[0]
    assert ours[1] == "perflab: 1 report of torch.profiler in profile-program: profile.json.gz"
    (trace,) = load(folder / "profile-program").traces
    assert {"aten::mm", "ProfilerStep#0", "ProfilerStep#2"} <= set(trace.names)
    assert "aten::relu" not in trace.names
    assert any("64, 64" in shape for shape in trace.shapes)
    assert len(trace.memory.time)


def test_jax_is_recorded_from_its_first_function_on(program):
    folder = program(
        """
        import jax
        jax.config.update("jax_num_cpu_devices", 2)  # refused once JAX has set up its backends
        print(jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((64, 64))), jax.device_count())
        """
    )
    status, out, _, ours = profiled(folder, "program.py")
    assert (status, out) == (0, "262144.0 2\n")
    assert ours[0] == "perflab: 1 report of jax.profiler in profile-program: profile.xplane.pb"
    assert load(folder / "profile-program").traces[0].format == "jax"


def test_a_torchrun_job_has_a_report_a_rank(program):
    folder = program(
        """
        import sys
        import torch
        import torch.distributed as dist
        dist.init_process_group("gloo")
        for step in range(8):
            gradient = torch.mm(torch.ones(64, 64), torch.ones(64, 64))
            dist.all_reduce(gradient)
        dist.destroy_process_group()
        if dist.is_available() and "fail" in sys.argv:
            raise RuntimeError("after the last step")
        """
    )
    torchrun = ("-m", TORCHRUN, "--standalone", "--nproc-per-node", "2")
    status, _, _, ours = profiled(folder, *torchrun, "program.py", "fail")
    assert status == 1  # torchrun's, for a rank that failed
    assert "perflab: 2 reports of torch.profiler in profile-program: rank0.json.gz, rank1.json.gz" in ours
    job = load(folder / "profile-program")
    assert [(trace.rank, trace.world_size) for trace in job.traces] == [(0, 2), (1, 2)]
    assert all("gloo:all_reduce" in trace.names for trace in job.traces)


@pytest.mark.parametrize(
    ("words", "launcher", "ran"),
    [
        (["python", "a.py", "-m"], ["python"], ["a.py", "-m"]),
        (
            ["python3", "-u", "-X", "dev", "-m", "pkg", "x"],
            ["python3", "-u", "-X", "dev"],
            ["-m", "pkg", "x"],
        ),
        ([PYTHON, "-c", "1", "-m"], [PYTHON], ["-c", "1", "-m"]),
        (
            [PYTHON, "-m", TORCHRUN, "--nproc-per-node", "2", "-m", "job", "--steps", "3"],
            [PYTHON, "-m", TORCHRUN, "--nproc-per-node", "2"],
            ["-m", "job", "--steps", "3"],
        ),
        (
            [PYTHON, "-m", TORCHRUN, "--standalone", "job.py", "--nproc-per-node", "9"],
            [PYTHON, "-m", TORCHRUN, "--standalone"],
            ["job.py", "--nproc-per-node", "9"],
        ),
    ],
)
def test_where_the_program_begins(words, launcher, ran):
    found = parse(words)
    assert (found.launcher, found.words) == (launcher, ran)


def test_a_console_script_is_run_by_its_interpreter(tmp_path):
    script = tmp_path / "tool"
    script.write_text(f"#!{PYTHON} -I\nprint('hello')\n")
    script.chmod(0o755)
    assert parse([str(script), "x"]).launcher == [PYTHON, "-I"]
    assert parse([str(script), "x"]).words == [str(script), "x"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ls", "-l"], "ls is no Python program"),
        (["no-such-command"], "there is no command 'no-such-command'"),
        (["python"], "names no program to profile"),
        (["python", "-"], "names no program to profile"),
        (["python", "-m"], "-m names nothing to run"),
        (["python", "-Bm", "x"], "give -m or -c as a word of its own"),
        ([PYTHON, "-m", TORCHRUN, "--nnodes"], "torchrun refuses this: "),
        ([PYTHON, "-m", TORCHRUN, "--no-python", "x"], "name a Python script instead"),
        (["python", "-m", "torch.distributed.launch", "x.py"], "use torchrun"),
    ],
)
def test_what_cannot_be_profiled_is_refused_in_one_line(words, said):
    with pytest.raises(ValueError, match=said) as refused:
        parse(words)
    assert "\n" not in str(refused.value)


def test_commands_of_an_environment_that_is_not_active_are_found(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = parse(["torchrun", "--nproc-per-node", "2", "job.py"])
    assert found.launcher[1:] == ["-m", TORCHRUN, "--nproc-per-node", "2"]
    beside = os.path.dirname(PYTHON)
    assert {os.path.dirname(found.launcher[0]), os.path.dirname(parse(["python", "a.py"]).launcher[0])} == {
        beside
    }
    with pytest.raises(ValueError, match="there is no command 'mpirun'"):
        parse(["mpirun", "job.py"])


def test_the_command_refuses_what_it_would_overwrite(program):
    folder = program("print('ran')")
    (folder / "old").mkdir()
    (folder / "old" / "report").write_text("")
    status, out, err = perflab("profile", "--output", "old", "--", "python", "program.py", folder=folder)
    assert (status, out) == (2, "")
    assert err == "perflab: --output old is there already, and not an empty folder; name a new one\n"
    status, _, err = perflab("profile", "python", "program.py", folder=folder)
    assert (status, err) == (2, "perflab: a program comes after --: perflab profile -- python program.py\n")
    status, _, err = perflab("profile", "--kind", "torhc", "--", "python", "program.py", folder=folder)
    assert (status, err) == (2, "perflab: --kind 'torhc' is unknown; did you mean 'torch'?\n")
    for count in ("", "-2"):
        assert profiled(folder, "program.py")[0] == 0
        assert (folder / f"profile-program{count}" / "profile.prof").exists()


def test_a_library_that_was_not_imported_leaves_no_report(program):
    folder = program("print('ran')")
    status, out, _, ours = profiled(folder, "program.py", options=("--kind", "jax"))
    assert (status, out) == (0, "ran\n")
    assert ours == ["perflab: no report: the program did not import jax", "perflab: no report was written"]
    assert not list(folder.glob("profile-*"))
