"""The formulas: stage times from the machine's constants, and what the simulator makes of them.

    forward          = FLOPs / matrix peak + 2 x kept / copy bandwidth + kept x page fault + calls
    input gradient   = the same with 1.5 x kept, since gradients are new memory too
    weight gradient  = FLOPs / matrix peak + 1.5 x kept / copy bandwidth + calls + starts of autograd
    backward         = both, with fewer calls and no start
    step             = simulator(schedule, stage times, link, overhead of an action) + 2 all-gathers
    bubble           = share of it in which a rank waits for what another has not computed yet
    overhead         = from when what an action needs is computed and its turn has come until it begins
    held             = most over ranks of the sum of what stages keep of the micro-batches in flight

FLOPs are a forward's; each gradient has as many. Kept is what autograd keeps: written and read on in forward,
read again, and its gradient written and read. Stage times of virtual devices are set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from labs.lab import Prediction
from labs.machine import Machine
from labs.pipeline import lost_time, real_stages, simulated, stage_times
from labs.pipeline.config import MODELS
from labs.pipeline.running import VIRTUAL

if TYPE_CHECKING:
    from labs.pipeline.config import Config
    from parallel.schedules import Durations, Schedule

FORWARD_TRIPS, GRADIENT_TRIPS = 2.0, 1.5  # of a kept tensor between memory and core
# Operators called (torch.profiler) forward and backward: of a block, of one of the decoder, of the rest.
BLOCK, DECODER_BLOCK, REST = (126, 311), (219, 532), (52, 80)
INPUT_SHARE, WEIGHT_SHARE = 0.75, 0.5  # of a backward's calls, in its halves: some are in both
FORKS = 6  # of a block: where the way to weights leaves the way to inputs (products and norms)
FORK_CALLS = 80  # what it takes to start autograd at one, in calls of an operator


@dataclass(frozen=True)
class Part:
    """A block, or what stands around the blocks: FLOPs of its forward, bytes it keeps, operators it calls."""

    flops: float
    kept: float
    calls: tuple[int, int]

    def __add__(self, other: Part) -> Part:
        calls = (self.calls[0] + other.calls[0], self.calls[1] + other.calls[1])
        return Part(self.flops + other.flops, self.kept + other.kept, calls)


def parts(config: Config, model: str) -> tuple[list[Part], Part]:
    """(each block in order, the rest) of ``model`` for one micro-batch."""
    whole: Any = real_stages.configuration(config, model)
    if model == "gpt":
        rest, (block,) = _differences(config, whole, ("layers",))
        blocks = [Part(*block, BLOCK)] * whole.layers
    else:
        rest, (encoder, decoder) = _differences(config, whole, ("encoder_layers", "decoder_layers"))
        blocks = [Part(*encoder, BLOCK)] * whole.encoder_layers
        blocks += [Part(*decoder, DECODER_BLOCK)] * whole.decoder_layers
    return blocks, Part(*rest, REST)


def _differences(
    config: Config, whole: Any, layers: Sequence[str]
) -> tuple[tuple[float, float], list[tuple[float, float]]]:
    """(FLOPs, kept) of what no layer has, and of one more of each kind of layer."""
    one = replace(whole, **dict.fromkeys(layers, 1))
    flops, kept = _costs(config, one)
    more = []
    for name in layers:
        other = _costs(config, replace(one, **{name: 2}))
        more.append((other[0] - flops, other[1] - kept))
    return (flops - sum(part[0] for part in more), kept - sum(part[1] for part in more)), more


def _costs(config: Config, whole: Any) -> tuple[float, float]:
    """(FLOPs of a forward, bytes kept) of a micro-batch through a model."""
    from labs.models import formulas
    from labs.models.configuration import GPTConfig

    sequences, length = config.sequences, config.length
    if isinstance(whole, GPTConfig):
        flops = formulas.flops_per_token(whole, length, backward=False) * length
        return float(flops * sequences), float(formulas.activation_bytes(whole, sequences, length))
    flops = formulas.flops_per_pair(whole, length, length, backward=False)
    kept = formulas.activation_bytes_of_pair(whole, sequences, length, length)
    return float(flops * sequences), float(kept)


def stage_parts(config: Config, model: str, count: int) -> list[Part]:
    """Each of ``count`` stages; what stands around the blocks belongs to the last, which has the head."""
    from labs.models.stages import layers_of_stages

    blocks, rest = parts(config, model)
    found = []
    for size in layers_of_stages(len(blocks), count):
        stage, blocks = blocks[:size], blocks[size:]
        found.append(sum(stage[1:], stage[0]))
    found[-1] = found[-1] + rest
    return found


def stage_durations(config: Config, machine: Machine, model: str, count: int) -> Durations:
    """Predicted seconds of each stage."""
    from parallel.schedules import Durations

    crowded = max(1.0, config.stages / machine.cores)
    call = machine["torch_call_s"]
    fault = (machine.get("page_fault_s_per_byte") or 0.0) if machine.allocator == "default" else 0.0
    rows: list[list[float]] = [[], [], [], []]
    for part in stage_parts(config, model, count):
        products = part.flops / machine.peak("float32", unit="matrix")
        memory = part.kept / machine.bandwidth(part.kept)
        forward = products + memory * FORWARD_TRIPS + part.kept * fault + part.calls[0] * call
        of_weights = products + memory * GRADIENT_TRIPS
        of_inputs = of_weights + part.kept * fault
        calls = part.calls[1] * call
        starts = FORKS * FORK_CALLS * part.calls[1] / BLOCK[1] * call
        halves = (of_inputs + INPUT_SHARE * calls, of_weights + WEIGHT_SHARE * calls + starts)
        for row, seconds in zip(rows, (forward, *halves, of_inputs + of_weights + calls), strict=True):
            row.append(seconds * crowded)
    return Durations(*rows)


def held_bytes(config: Config, model: str, count: int) -> list[float]:
    """What each stage keeps of a micro-batch between forward and backward."""
    return [part.kept for part in stage_parts(config, model, count)]


# --- stated before anything is measured ----------------------------------------------------------


def predict(config: Config, machine: Machine) -> Sequence[Prediction]:
    """Every step, every bubble, every activation held; and that stage times tell step times."""
    return [*_stage_times(config, machine), *_real(config, machine), *_virtual(config, machine)]


def _stage_times(config: Config, machine: Machine) -> Iterator[Prediction]:
    for model in MODELS:
        found = stage_durations(config, machine, model, config.stages)
        for kind in stage_times.KINDS:
            row = getattr(found, kind)
            yield Prediction(
                f"{stage_times.GROUP}/{model}",
                f"{stage_times.key(config.stages, 0, kind)}_s",
                row[0],
                f"{_ms(row[0])} of {_ms(sum(row))} for all {config.stages} stages",
                "operators on small tensors, which come nowhere near the peak",
            )


def _real(config: Config, machine: Machine) -> Iterator[Prediction]:
    for model in MODELS:
        size = simulated.state_bytes(config, model)
        for name in config.names(config.stages):
            schedule = config.schedule_of(name, config.stages)
            durations = stage_durations(config, machine, model, schedule.stages)
            yield from _of_schedule(
                machine, model, name, schedule, durations, size, "stage times, which are small operators'"
            )
            yield _held(config, model, name, schedule)
            yield Prediction(
                "",
                f"{model}_{name}_ratio",
                1.0,
                "step measured / simulated from stage times measured alone",
                "ranks that share a core or memory bandwidth with each other and with gloo's threads",
            )


def _virtual(config: Config, machine: Machine) -> Iterator[Prediction]:
    for name in config.names(config.ranks):
        schedule = config.schedule_of(name, config.ranks)
        durations = simulated.virtual_durations(config, schedule)
        suspect = "ranks that wake late from their sleep: more of them than cores"
        yield from _of_schedule(machine, VIRTUAL, name, schedule, durations, 0.0, suspect)


def _of_schedule(
    machine: Machine,
    group: str,
    name: str,
    schedule: Schedule,
    durations: Durations,
    size: float,
    suspect: str,
) -> Iterator[Prediction]:
    from parallel.schedules import peak_activations

    address = f"{group}/{name}"
    timeline = simulated.timeline(machine, schedule, durations, size)
    step = timeline.step + simulated.meetings(machine, schedule.world_size)
    lost = lost_time.of_timeline(timeline)
    text = (
        f"{schedule.microbatches} micro-batches over {schedule.stages} stages on {schedule.world_size} "
        f"ranks: bubble {lost.bubble:.1%} of {_ms(timeline.step)}, {1e6 * lost.overhead:.0f} us before "
        f"each of {len(timeline.rank)} actions"
    )
    yield Prediction(address, "time_s", step, text, suspect)
    yield Prediction(address, "bubble_ratio", lost.bubble, text, suspect)
    yield Prediction(address, "overhead_s", lost.overhead, text, "how soon a rank that waits is woken")
    yield Prediction(
        address,
        "in_flight",
        float(peak_activations(schedule).max()),
        "on the fullest rank: stages x micro-batches between forward and the end of backward",
        "the count: these are equal or one of both is wrong",
        exact=True,
    )


def _held(config: Config, model: str, name: str, schedule: Schedule) -> Prediction:
    """Bytes on the fullest rank."""
    from parallel.schedules import peak_activations

    held = peak_activations(schedule, held_bytes(config, model, schedule.stages))
    text = f"what autograd keeps of the micro-batches in flight, on rank {int(held.argmax())}"
    suspect = "what is alive beside it: gradients on their way, messages, an operator's own buffers"
    return Prediction(f"{model}/{name}", "held_B", float(held.max()), text, suspect)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"


def memory_bytes(config: Config) -> float:
    """Every schedule's pipeline is alive at once in a group, each with its weights and gradients; activations
    of one at a time."""
    from labs.models.formulas import parameters

    ways = max(1, len(config.names(config.stages)))
    models = [8.0 * parameters(real_stages.configuration(config, model)) for model in MODELS]
    kept = [config.microbatches * sum(held_bytes(config, model, 1)) for model in MODELS]
    return (config.stages + config.ranks) * 4e8 + config.stages * ways * max(models) + max(kept)
