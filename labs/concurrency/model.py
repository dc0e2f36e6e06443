"""The cost model: start-up + tasks x cost of a task + bytes x cost of a byte + work / workers that can run.

The GIL enters in one place: work that holds it is not divided by the number of threads.
Counts of bytecodes and hand-overs were taken with ``sys.settrace`` (``f_trace_opcodes``) on CPython 3.11,
in the parent and its helper threads; they are properties of the standard library's code, not timings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from labs.concurrency.config import PAYLOAD_ITERATIONS, PAYLOAD_SWEEP, TASK_SWEEP, Config
from labs.lab import Prediction
from labs.machine import MMAP_THRESHOLD_BYTES, Machine


@dataclass(frozen=True)
class Code:
    """What the standard library executes for one task: bytecodes and calls, of Python or C functions."""

    bytecodes: int
    calls: int

    def seconds(self, machine: Machine) -> float:
        # A bytecode of such code (an attribute, an argument, a branch) costs about what one does in the
        # arithmetic loop with its allocation of a float; what a call adds is known separately.
        return self.bytecodes * machine["python_operation_s"] + self.calls * machine["python_call_s"]


THREAD_TASK = Code(610, 60)  # ThreadPoolExecutor: submit, the worker's turn, result
PROCESS_TASK = Code(2940, 260)  # ProcessPoolExecutor in the parent: submit, feeder, manager thread, result
WORKER_TASK = Code(480, 45)  # ProcessPoolExecutor in the worker
COROUTINE = Code(500, 45)  # asyncio.gather: a task that only returns
SLEEPER = Code(1030, 96)  # asyncio.gather: a task that awaits asyncio.sleep

# Of one process task: two ways through a pipe and one byte that wakes the manager thread; to the feeder
# thread and from the manager. (getrusage counts 2 voluntary and 1.3 other switches a task in the parent.)
PIPE_HAND_OVERS = 3
THREAD_HAND_OVERS = 2

# Of one iteration of the Python loop: three of arithmetic, and two to count (a new int and its store, a jump
# that also looks for signals).
OPERATIONS = 5


@dataclass(frozen=True)
class Costs:
    """Seconds of the parts, from the machine's constants alone."""

    workers: int
    running: int  # workers that can run at once
    operation: float
    thread_task: float
    process_task: float
    coroutine: float
    sleeper: float
    byte: float  # one way through pickle and pipe

    @classmethod
    def of(cls, config: Config, machine: Machine) -> Costs:
        """ValueError when the machine lacks a constant that every cost needs."""
        running = max(1, min(config.pool, machine.cores))
        hand_over = (
            PIPE_HAND_OVERS * machine["process_switch_s"] + THREAD_HAND_OVERS * machine["thread_switch_s"]
        )
        return cls(
            config.pool,
            running,
            machine["python_operation_s"],
            THREAD_TASK.seconds(machine),
            PROCESS_TASK.seconds(machine) + hand_over + WORKER_TASK.seconds(machine) / running,
            COROUTINE.seconds(machine),
            SLEEPER.seconds(machine),
            machine["pickle_s_per_byte"] + machine["pipe_s_per_byte"],
        )

    def python(self, iterations: float) -> float:
        return OPERATIONS * iterations * self.operation


def rounds(tasks: int, workers: int) -> int:
    """How many tasks one worker gets when tasks are dealt out evenly."""
    return math.ceil(tasks / workers)


def crossover_task_s(costs: Costs) -> float:
    """Task length at which n (t + L) = n (p + L / workers): below it threads win, above it processes."""
    return (costs.process_task - costs.thread_task) / (1 - 1 / costs.running)


def crossover_payload_B(costs: Costs, length: float) -> float:
    """Bytes a task of ``length`` seconds may carry each way before what processes save is spent."""
    saved = length * (1 - 1 / costs.running) - (costs.process_task - costs.thread_task)
    return saved / (2 * costs.byte)


NEEDED = (
    "python_operation_s",
    "python_call_s",
    "process_switch_s",
    "thread_switch_s",
    "pickle_s_per_byte",
    "pipe_s_per_byte",
)


def predict(config: Config, machine: Machine) -> Sequence[Prediction]:
    """Every time that the machine's constants suffice for; a spec sheet may have too few for any."""
    if any(machine.get(name) is None for name in NEEDED):
        return []
    costs = Costs.of(config, machine)
    parts = (_python, _released, _waiting, _start_up, _per_task, _moving, _sweeps, _timeline)
    return [prediction for part in parts for prediction in part(config, machine, costs)]


BUSY = "another program on the cores: the constants are best cases, the measurement is a median"


def _time(variant: str, value: float, because: str, suspect: str = BUSY) -> Prediction:
    return Prediction(variant, "time_s", value, because, suspect)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.3g} us"


def _python(config: Config, machine: Machine, costs: Costs) -> Iterator[Prediction]:
    task, n = costs.python(config.iterations), config.tasks
    one = f"{_ms(task)} ({config.iterations} x {OPERATIONS} operations of {1e9 * costs.operation:.3g} ns)"
    turns = rounds(n, costs.running)
    yield _time("python_work/serial", n * task, f"{n} tasks x {one}", BUSY)
    yield _time(
        "python_work/threads",
        n * (task + costs.thread_task),
        f"the GIL lets one thread run: {n} x ({one} + {_us(costs.thread_task)} to hand it over)",
        "a build of Python without the GIL",
    )
    yield _time(
        "python_work/processes",
        turns * task + n * costs.process_task,
        f"{turns} tasks a worker x {one} + {n} x {_us(costs.process_task)}",
        BUSY,
    )
    yield _time(
        "python_work/ray",
        turns * task,
        f"{turns} tasks a worker x {one}; Ray's own cost a task is not in the model",
        "Ray's scheduler and its daemons, which share the cores",
    )


def _released(config: Config, machine: Machine, costs: Costs) -> Iterator[Prediction]:
    n, turns = config.tasks, rounds(config.tasks, costs.running)
    if machine.get("numpy_call_s") is not None and "copy_1" in machine.curves:
        size = 8.0 * config.elements
        call, rate = machine["numpy_call_s"], machine.bandwidth(2 * size)
        task = config.numpy_iterations * (3 * call + 7 * size / rate)
        moved = f"{7 * size / 1e3:.0f} kB at {rate / 1e9:.0f} GB/s"
        one = f"{_ms(task)} (3 calls of {_us(call)} and {moved} an iteration)"
        suspect = "the arrays' place in the cache: the copy that sets the rate has other access patterns"
        yield _time("numpy_work/serial", n * task, f"{n} tasks x {one}", suspect)
        yield _time(
            "numpy_work/threads", turns * task, f"{turns} tasks a thread x {one}: the GIL is free", suspect
        )
        total = turns * task + n * costs.process_task
        yield _time("numpy_work/processes", total, f"{turns} tasks a worker x {one} + cost of tasks", suspect)
    if machine.get("fma_latency_s") is not None:
        latency = machine["fma_latency_s"]
        task = 2 * config.numba_iterations * latency
        one = f"{_ms(task)} ({config.numba_iterations} x 2 dependent operations of {1e9 * latency:.2g} ns)"
        suspect = "an addition or a multiplication alone may be quicker than the FMA whose latency is used"
        yield _time("numba_work/serial", n * task, f"{n} tasks x {one}", suspect)
        yield _time("numba_work/threads_holding_gil", n * task, f"{n} tasks x {one}, one at a time", suspect)
        yield _time("numba_work/threads_nogil", turns * task, f"{turns} tasks a thread x {one}", suspect)
        total = turns * task + n * costs.process_task
        yield _time("numba_work/processes", total, f"{turns} tasks a worker x {one} + cost of tasks", suspect)


def _waiting(config: Config, machine: Machine, costs: Costs) -> Iterator[Prediction]:
    from labs.concurrency.compute import MANY_THREADS

    n, many, wait = config.waits, config.many_waits, config.wait_s
    turns, batches = rounds(n, costs.workers), rounds(many, MANY_THREADS)
    yield _time("waiting/serial", n * wait, f"{n} x {_ms(wait)}")
    total = turns * wait + n * costs.process_task
    yield _time("waiting/processes", total, f"{turns} waits a worker + {n} x {_us(costs.process_task)}")
    total = wait + n * costs.thread_task
    yield _time("waiting/threads", total, f"all at once, {_ms(wait)} + {n} x {_us(costs.thread_task)}")
    yield _time(
        "waiting/asyncio", wait + n * costs.sleeper, f"all at once, {_ms(wait)} + {n} x {_us(costs.sleeper)}"
    )
    yield _time("waiting/ray", turns * wait, f"{turns} waits a worker; Ray's own cost is not in the model")
    total = batches * wait + many * costs.thread_task
    yield _time(
        "many_waits/threads_100", total, f"{batches} waits a thread + {many} x {_us(costs.thread_task)}"
    )
    total = wait + many * costs.sleeper
    yield _time("many_waits/asyncio", total, f"{_ms(wait)} + {many} x {_us(costs.sleeper)}")


def _start_up(config: Config, machine: Machine, costs: Costs) -> Iterator[Prediction]:
    n = config.pool
    first = n * costs.process_task
    threads = machine.get("thread_start_s")
    if threads is not None:
        hand_over = 2 * machine["thread_switch_s"]  # to the new thread, and to its end
        total = n * (threads + hand_over + costs.thread_task)
        because = f"{n} x ({_us(threads)} to start + {_us(hand_over)} + {_us(costs.thread_task)} of a task)"
        yield _time("start_up/threads", total, because, BUSY)
    suspect = (
        "a pool's workers do more than the bare process: queues, an initializer, copies of touched pages"
    )
    fork = machine.get("fork_s")
    if fork is not None:
        total = n * fork + first
        yield _time("start_up/fork", total, f"{n} x {_ms(fork)}, one after the other, + {n} tasks", suspect)
    for method in ("forkserver", "spawn"):
        one = machine.get(f"{method}_s")
        if one is not None:
            total = n * one / costs.running + first
            because = f"{n} x {_ms(one)} on {costs.running} cores (a new interpreter's work) + {n} tasks"
            yield _time(f"start_up/{method}", total, because, suspect)


def _per_task(config: Config, machine: Machine, costs: Costs) -> Iterator[Prediction]:
    n, chunk = config.tiny_tasks, config.chunk
    for name, code, each in (
        ("asyncio", COROUTINE, costs.coroutine),
        ("threads", THREAD_TASK, costs.thread_task),
    ):
        because = f"{n} x {_us(each)}: {code.bytecodes} bytecodes and {code.calls} calls"
        yield _time(f"per_task/{name}", n * each, because, BUSY)
    because = (
        f"{n} x {_us(costs.process_task)}: {PROCESS_TASK.bytecodes} bytecodes in the parent, "
        f"{PIPE_HAND_OVERS} hand-overs through pipes, {THREAD_HAND_OVERS} between threads"
    )
    suspect = "three threads of the parent that fight for its GIL"
    yield _time("per_task/processes", n * costs.process_task, because, suspect)
    if machine.get("pickle_item_s") is not None and machine.get("python_call_s") is not None:
        item = 2 * machine["pickle_item_s"] + 2 * machine["python_call_s"]
        total = rounds(n, chunk) * costs.process_task + n * item
        because = f"{rounds(n, chunk)} chunks x {_us(costs.process_task)} + {n} items x {_us(item)}"
        yield _time("per_task/processes_chunked", total, because, BUSY)


def _moving(config: Config, machine: Machine, costs: Costs) -> Iterator[Prediction]:
    size = 4.0 * config.payload_elements
    if "copy_1" not in machine.curves:
        return
    # Variants run interleaved, so each finds the caches filled with the other five's arrays.
    rate = machine.bandwidth(6 * 2 * size)
    work = 2 * size / rate
    mapped = machine.allocator == "default" and size >= MMAP_THRESHOLD_BYTES  # anew at each call
    fresh = size * (machine.get("page_fault_s_per_byte") or 0.0) if mapped else 0.0
    moved = 2 * size * costs.byte
    task = costs.process_task
    copies = f"{2 * size / 2**20:.0f} MiB read and written at {rate / 1e9:.0f} GB/s (caches cold)"
    yield _time("transfer/serial", work + fresh, copies, "whether the allocator hands out touched pages")
    yield _time(
        "transfer/thread", work + fresh + costs.thread_task, f"{copies} + a task: nothing is copied", BUSY
    )
    yield _time(
        "transfer/process_pickled",
        moved + work + fresh + task,
        f"2 x {size / 2**20:.0f} MiB x {1e9 * costs.byte:.3g} ns/B of pickle and pipe + {copies} + a task",
        "copies inside the executor's queues that the bare pipe does not make",
    )
    suspect = "the worker reads from the other core's cache, and wakes from sleep"
    yield _time(
        "transfer/process_shared_memory",
        3 * work + fresh + task,
        f"3 times (in, work, out) {copies} + a task of {_us(task)}",
        suspect,
    )
    yield _time(
        "transfer/process_shared_memory_resident", work + task, f"{copies} + a task of {_us(task)}", suspect
    )
    if "copy_all" in machine.curves:
        n = config.ranks
        touched = (n + 1) * size
        both = machine.bandwidth(2 * touched, threads=0)  # of both variants: they share the caches
        total = touched / both + n * costs.thread_task
        yield _time(
            "combine/threads", total, f"{touched / 2**20:.0f} MiB at {both / 1e9:.0f} GB/s + {n} tasks", BUSY
        )
        # A ring sends each rank's share n - 1 times around, twice: summed, then spread.
        sent = 2 * (n - 1) / n * size
        total = work + sent * machine["pipe_s_per_byte"] + 2 * n * machine["process_switch_s"]
        yield _time(
            "combine/processes_gloo",
            total,
            f"a copy + {sent / 2**20:.0f} MiB out and in through the kernel at the pipe's cost a byte",
            "gloo's sockets: loopback TCP costs other than a pipe's",
        )


def _sweeps(config: Config, machine: Machine, costs: Costs) -> Iterator[Prediction]:
    n = config.sweep_tasks
    longest = TASK_SWEEP[-1]
    yield _time(
        f"crossover_task/serial_{longest}", n * costs.python(longest), f"{n} x {_ms(costs.python(longest))}"
    )
    for iterations in TASK_SWEEP:
        length = costs.python(iterations)
        total = n * (length + costs.thread_task)
        because = f"{n} x ({_us(length)} + {_us(costs.thread_task)})"
        yield _time(f"crossover_task/threads_{iterations}", total, because, BUSY)
        total = n * (length / costs.running + costs.process_task)
        because = f"{n} x ({_us(length)} / {costs.running} + {_us(costs.process_task)})"
        yield _time(f"crossover_task/processes_{iterations}", total, because, BUSY)
    n, length = config.pool, costs.python(PAYLOAD_ITERATIONS)
    for size in PAYLOAD_SWEEP:
        total = n * (length + costs.thread_task)
        yield _time(
            f"crossover_payload/threads_{size}", total, f"{n} x {_ms(length)}: the payload stays", BUSY
        )
        total = n * (length / costs.running + costs.process_task + 2 * size * costs.byte)
        because = (
            f"{n} x ({_ms(length)} / {costs.running} + a task + 2 x {size} B x {1e9 * costs.byte:.3g} ns)"
        )
        yield _time(f"crossover_payload/processes_{size}", total, because, BUSY)
    if costs.running < 2:
        return  # one core: processes never win
    value = crossover_task_s(costs)
    because = (
        f"({_us(costs.process_task)} a process task - {_us(costs.thread_task)} a thread task)"
        f" / (1 - 1/{costs.running})"
    )
    yield Prediction("", "crossover_task_s", value, because, BUSY)
    value = crossover_payload_B(costs, length)
    if value > 0:
        because = f"what {_ms(length)} of work saves / (2 x {1e9 * costs.byte:.3g} ns a byte)"
        yield Prediction("", "crossover_payload_B", value, because, BUSY)


def _timeline(config: Config, machine: Machine, costs: Costs) -> Iterator[Prediction]:
    from labs.concurrency.timeline import GROUP, PIECES, shown

    count = shown(config)
    work = PIECES * costs.python(max(1, config.iterations // 25))
    yield _time(f"{GROUP}/threads_python", count * work, f"{count} x {_ms(work)}, one at a time", BUSY)
    turns = rounds(count, max(1, machine.cores))
    yield _time(f"{GROUP}/processes_python", turns * work, f"{count} x {_ms(work)} together", BUSY)
