"""The formulas: costs of a step from the machine's constants, and what the simulator makes of them.

    reading  = reading all weights + calls of operators
    writing  = reading all weights: a decode is one compiled call
    anew     = reading them from memory - reading them from where they lie when nothing came between
    prompts  = calls of operators that each piece of a prompt has to itself
    new      = 2 x numbers in matrices / peak
               + 2 x activations / copy bandwidth + activations x page fault      a token of a prompt
    pairs    = 4 x width x layers / peak                           a query meets a key
    earlier  = 2 x keys and values of a token / copy bandwidth     keys of earlier pieces, gathered
    decodes  = as a token of a prompt, without page faults: few tokens stay in memory that is there
    context  = keys and values of a token / read bandwidth         a key read by a decode
    submit   = a hand-over to another process, and one to another thread     socket, then the engine's inbox
    deliver  = a hand-over to another process                                socket
    handed over: copies of the bytes, one each to take out and to store and two to send, and two actor calls
    TTFT, ITL = simulator(arrivals, layout, these)

What is measured on the workers later (``calibrating``) replaces all of this; the simulator stays the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from labs.lab import Prediction
from labs.machine import Machine
from labs.serving.config import Config
from labs.serving.costs import Costs, Fitted, Wires
from labs.serving.layout import POLICIES, Layout
from labs.serving.measures import Limits, Measures, measure
from labs.serving.simulator import simulate
from labs.serving.trace import Arrival, Load, arrivals
from labs.serving.weights import VOCABULARY, kv_bytes_per_token

LIVE = "live"
CALLS_OF_BLOCK, CALLS_OF_PIECE, CALLS_OF_STEP = 115, 12, 60  # operators (torch.profiler), views among them
WIDTHS, HIDDENS = 14, 4  # activations of a token in a block: so often its width, and the feed-forward's
ACTOR_CALL_S = 1e-3  # Ray's documentation promises no figure; its own benchmarks say about 1 ms
FORMULA_BLOCKS = 3  # of load that a prediction looks at


def numbers_in_matrices(width: int, layers: int) -> int:
    """Of all blocks and the head: attention has 4 matrices, SwiGLU 3 of 8/3 the width."""
    hidden = -(-8 * width // 24) * 8
    block = 4 * width**2 + 3 * width * hidden
    return layers * block + VOCABULARY * width


def worker_bytes(width: int, layers: int, tokens: int) -> float:
    """Memory of a worker: its process, weights (also packed, to decode with) and cache of so many tokens."""
    return 5e8 + 8.0 * numbers_in_matrices(width, layers) + tokens * kv_bytes_per_token(width, layers)


def costs_of(config: Config, machine: Machine) -> Costs:
    """Seconds of each term, a thread a worker."""
    crowded = max(1.0, config.workers / machine.cores)
    numbers, kept = (
        numbers_in_matrices(config.width, config.layers),
        kv_bytes_per_token(config.width, config.layers),
    )
    peak, call = machine.peak("float32", unit="matrix"), machine["torch_call_s"]
    weights = 4.0 * numbers
    read = weights / machine.bandwidth(weights, kind="read")
    hidden = -(-8 * config.width // 24) * 8
    activations = 4.0 * config.layers * (WIDTHS * config.width + HIDDENS * hidden)
    fault = (machine.get("page_fault_s_per_byte") or 0.0) if machine.allocator == "default" else 0.0
    token = 2 * numbers / peak + 2 * activations / machine.bandwidth(
        config.prompt * activations / config.layers
    )
    cache = float(config.blocks * 16 * kept)
    far = weights / machine.bandwidth(cache + 2 * weights, kind="read")
    return Costs(
        reading=crowded * (read + (config.layers * CALLS_OF_BLOCK + CALLS_OF_STEP) * call),
        writing=crowded * read,
        reading_anew=crowded * max(0.0, far - read),
        writing_anew=crowded * max(0.0, far - read),
        prompts=crowded * config.layers * CALLS_OF_PIECE * call,
        new=crowded * (token + activations * fault),
        pairs=crowded * 4 * config.width * config.layers / peak,
        earlier=crowded * 2 * kept / machine.bandwidth(cache),
        decodes=crowded * token,
        context=crowded * kept / machine.bandwidth(cache, kind="read"),
    )


def wires_of(machine: Machine) -> Wires:
    """Requests and tokens go over a worker's socket. Of what is handed over Ray's object store holds a copy,
    from which the receiver reads; each side makes another."""
    socket, copy = machine["process_switch_s"], 1 / machine.bandwidth(64e6)
    submit = socket + machine["thread_switch_s"]
    return Wires(submit, socket, 0.0, copy, 2 * ACTOR_CALL_S, 2 * copy, 0.0, copy)


def load_of(config: Config) -> Load:
    return Load(config.rate, config.prompt, config.output, seed=config.seed)


def limits_of(config: Config) -> Limits:
    return Limits(config.ttft_ms / 1e3, config.itl_ms / 1e3)


def measures_of(
    config: Config, trace: Sequence[Arrival], layout: Layout, fitted: Fitted, seed: int = 0
) -> Measures:
    """What would be measured of these requests. seed: of what is drawn from the disturbance."""
    size = kv_bytes_per_token(config.width, config.layers)
    found = simulate(trace, layout, fitted.costs, fitted.wires, size, fitted.disturbance, seed)
    return measure(found.served, limits_of(config))


def simulated(config: Config, policy: str, block: int, fitted: Fitted, chunk: int = 0) -> Measures:
    """A block of the lab's load in the simulator."""
    trace = arrivals(load_of(config), config.requests, block * config.requests)
    return measures_of(config, trace, config.layout(policy, chunk), fitted, block)


def predict(config: Config, machine: Machine) -> Sequence[Prediction]:
    """Medians of every policy, over the blocks of load, and that fitted costs tell them within the interval.
    How long a block takes is no prediction: its arrivals decide that."""
    return list(_predictions(config, machine))


def _predictions(config: Config, machine: Machine) -> Iterator[Prediction]:
    costs = costs_of(config, machine)
    formulas = Fitted(costs, wires_of(machine))
    for policy in POLICIES:
        first, gaps = [], []
        for block in range(1, FORMULA_BLOCKS + 1):
            found = simulated(config, policy, block, formulas)
            first.append(found.ttft_p50)
            gaps.append(found.itl_p50)
        because = (
            f"simulated: all weights {1e3 * costs.writing:.2f} ms, a token read {1e6 * costs.new:.0f} us, "
            f"{config.requests} requests at {config.rate:g}/s"
        )
        for key, row in (("ttft_p50_s", first), ("itl_p50_s", gaps)):
            suspect = "matrices of few rows, which come nowhere near the peak"
            yield Prediction("", f"{policy}_{key}", sorted(row)[len(row) // 2], because, suspect)
        for key in ("ttft_p50", "itl_p50"):
            yield Prediction(
                "",
                f"{policy}_{key}_ratio",
                1.0,
                "measured / simulated with costs fitted to other load",
                "work of other programs during the run",
            )


def memory_bytes(config: Config) -> float:
    """The workers, and the object store."""
    return config.workers * worker_bytes(config.width, config.layers, config.blocks * 16) + 3e8
