"""Bytes and seconds of each form, before it runs.

Storage     the numbers of each matrix times the bytes of one, with scales, masks and columns: exact
A token     max(bytes it reads / bandwidth of memory, slots / vector peak) + calls
            A slot is a vector instruction on 16 weights, each worth 2 FLOPs. A weight of float32 needs 1
            (the FMA), int8 3 (load with sign extension, to float, FMA), int4 4 (a mask or shift more). Of
            widened weights it is the sum, not the larger: a core that waits for a line has too little room
            to widen ahead. Of compressed rows a weight also waits for the FMA of the one before.
A prompt    max(2 FLOPs a weight and token / rate of the library's product of few rows with large weights of
            the type, bytes of the weights / bandwidth); integers are also written and read as float32, in
            cache; with AMX as bfloat16, and activations come in three bfloat16 parts, whose sum they are
A round     k tokens of the draft and one pass of k + 1 of the large model: it reads its weights once; of
            proposals that are right with probability a it gives (1 - a^(k + 1)) / (1 - a) tokens
A KV cache  bytes of keys and values / bandwidth; of int8 also slots and calls, one a head
"""

from __future__ import annotations

from collections.abc import Sequence

from labs.lab import Prediction
from labs.machine import Curve, Machine
from labs.models.configuration import GPTConfig
from labs.precision import sizes
from labs.precision.config import Config

QUALITY = (
    *("float32", "bfloat16", "int8", "int4", "cache_int8", "cache_int4", "pruned", "structured", "healed"),
    *("tuned", "low_rank", "distilled", "alone", "early_exit", "speculative"),
)
TOKEN = ("float32", "bfloat16", "int8", "int4")
SMALLER = ("float32", "structured", "low_rank", "sparse", "early_exit", "distilled", "lora")
SPECULATIVE = ("token", "verify", "round")
CACHE = ("float32", "bfloat16", "int8")
SLOTS = {"int8": 3, "int4": 4}
BLOCK_CALLS = 30  # of torch in a block, few tokens: linear layers, norms, attention, sums, views
QUANTIZED_CALLS = 6  # of one quantised product beside its own: checks, contiguity, a bias, a result
AMX_PARTS = 3  # bfloat16 numbers whose sum is a float32: as many products with integer weights
STRIP_BYTES = 8 << 20  # of packed weights, used for all rows before the next


def reading(machine: Machine) -> float:
    """Bytes per second of weights that all come from memory.

    The slower of a copy and a bare reading loop, as a product does more than read. Both were measured by
    going over a working set again and again, which finds a cache's share of it still there, and how large
    that is, a system on a shared processor does not know. What the larger of two working sets costs more than
    the smaller is the price of memory alone. Here much else is read in between.
    """
    return min(_beyond_caches(machine.curves[f"{kind}_all"]) for kind in ("read", "copy"))


def _beyond_caches(curve: Curve) -> float:
    """Bytes per second of what a curve's largest working set has more than a quarter of it."""
    largest = curve.working_set_bytes[-1]
    part = largest / 4
    more = largest / curve.at(largest) - part / curve.at(part)
    return min(curve.at(largest), (largest - part) / more) if more > 0 else curve.at(largest)


def token_seconds(
    config: Config, machine: Machine, form: str, tokens: int = 1, model: GPTConfig | None = None
) -> tuple[float, str]:
    """Seconds of ``tokens`` in one pass through the large model (or another) in this form, and why."""
    moved = sizes.token_bytes(model or config.large, form)
    model = sizes.config_of(model or config.large, form)
    rate = reading(machine)
    weights = model.layers * sum(matrix.numbers for matrix in sizes.matrices(model))
    peak = machine.peak("float32", threads=0)
    compute = 2 * weights * (SLOTS.get(form, 1) + tokens - 1) / peak
    if form == "sparse":  # one sum a row, a gathered number at a time
        compute = (1 - sizes.SPARSITY) * weights * (machine.get("fma_latency_s") or 0.0) / machine.cores
    together = (moved / rate, compute)
    seconds = sum(together) if form in (*SLOTS, "sparse") else max(together)
    calls = model.layers * (BLOCK_CALLS + (6 * QUANTIZED_CALLS if form in SLOTS else 0))
    over = calls * (machine.get("torch_call_s") or 0.0)
    over += 6 * model.layers * (form in SLOTS) * (machine.get("torch_custom_call_s") or 0.0)
    over += 6 * model.layers * (machine.get("torch_parallel_region_s") or 0.0)
    limit = "memory" if moved / rate > compute else "compute"
    because = (
        f"{moved / 1e6:.0f} MB at {rate / 1e9:.1f} GB/s = {moved / rate * 1e3:.2f} ms, computing "
        f"{compute * 1e3:.2f} ms ({limit} is the limit), {calls} calls {over * 1e3:.2f} ms"
    )
    return seconds + over, because


def round_seconds(config: Config, machine: Machine) -> tuple[float, str]:
    draft, _ = token_seconds(config, machine, "int8", model=sizes.student_of(config.large))
    verify, because = token_seconds(config, machine, "int8", config.lookahead + 1)
    return (
        config.lookahead * draft + verify,
        f"{config.lookahead} tokens of the draft, {draft * 1e3:.2f} ms each, and one pass: {because}",
    )


def tokens_per_round(acceptance: float, lookahead: int) -> float:
    """(1 - a^(k + 1)) / (1 - a): expected tokens of a round when each proposal is right with probability a.

    Source: Leviathan et al. 2023, equation 1.
    """
    if acceptance >= 1:
        return lookahead + 1.0
    return (1 - acceptance ** (lookahead + 1)) / (1 - acceptance)


def multiplies_by_amx(machine: Machine) -> bool:
    """Whether the matrix unit multiplies many rows and integer weights (``kernels.matmul.cpu_amx``)."""
    return machine.facts.get("amx") == "usable"


def prompt_seconds(config: Config, machine: Machine, form: str) -> tuple[float, str]:
    """A prompt through one block: arithmetic, or reading where that is faster yet.

    Integers are widened to the type of the product, which is written and read once more in strips that stay
    in cache, and multiplied by code of our own, for which the library's rate stands.
    """
    matrices = sizes.matrices(config.block)
    by_amx = form in SLOTS and multiplies_by_amx(machine)
    dtype = "bfloat16" if form == "bfloat16" or by_amx else "float32"
    parts = AMX_PARTS if by_amx else 1
    each = [2.0 * parts * matrix.numbers * config.prompt for matrix in matrices]
    thin = machine.get(f"torch_thin_product_{dtype}_all_flops")
    compute = sum(flops / (thin or machine.product_rate(flops, dtype, threads=0)) for flops in each)
    moved, rate = sizes.block_bytes(config.block, form), reading(machine)
    width = 2.0 if by_amx else 4.0
    widened = 2 * width * sum(matrix.numbers for matrix in matrices) if form in SLOTS else 0.0
    packing = widened / machine.bandwidth(STRIP_BYTES, threads=0)
    because = (
        f"{sum(each):.3g} FLOPs at the rate of thin {dtype} products {compute * 1e3:.2f} ms, "
        f"{moved / 1e6:.0f} MB at {rate / 1e9:.1f} GB/s {moved / rate * 1e3:.2f} ms, "
        f"packing {packing * 1e3:.2f} ms"
    )
    return max(compute, moved / rate) + packing, because


def cache_bytes(config: Config, form: str) -> float:
    bits = {"float32": 32, "bfloat16": 16, "int8": 8}[form]
    return config.sequences * config.context * sizes.cache_bytes_per_token(config.cache_heads, 128, bits)


def cache_seconds(config: Config, machine: Machine, form: str) -> tuple[float, str]:
    moved = cache_bytes(config, form)
    rate = reading(machine)
    if form != "int8":
        return moved / rate, f"{moved / 1e6:.0f} MB at {rate / 1e9:.1f} GB/s"
    numbers = 2 * config.sequences * config.context * config.cache_heads * 128
    compute = 2 * numbers * SLOTS[form] / machine.peak("float32", threads=0)
    products = 2 * config.sequences * config.cache_heads
    calls = products * (QUANTIZED_CALLS + 1)
    over = products * QUANTIZED_CALLS * (machine.get("torch_call_s") or 0.0)
    over += products * (machine.get("torch_custom_call_s") or 0.0)
    because = (
        f"{moved / 1e6:.0f} MB at {rate / 1e9:.1f} GB/s, computing {compute * 1e3:.2f} ms, {calls} calls "
        f"{over * 1e3:.2f} ms"
    )
    return moved / rate + compute + over, because


def predict(config: Config, machine: Machine) -> Sequence[Prediction]:
    recipe = config.recipe
    which = "make model's" if recipe.name == "full" else f"the {recipe.name} one, as make model has not run"
    found = []
    for form in QUALITY:
        count = file_bytes(config, form)
        because = f"{count:.0f} B of tensors; the model judged is {which}"
        found.append(Prediction(f"quality/{form}", "weights_B", count, because, exact=True))
    for form in TOKEN:
        found.append(_time(f"token/{form}", token_seconds(config, machine, form)))
    for form in SMALLER:
        found.append(_time(f"smaller/{form}", token_seconds(config, machine, form)))
    found.append(_time("speculative/token", token_seconds(config, machine, "int8")))
    found.append(_time("speculative/verify", token_seconds(config, machine, "int8", config.lookahead + 1)))
    found.append(_time("speculative/round", round_seconds(config, machine)))
    for form in CACHE:
        found.append(_time(f"cache/{form}", cache_seconds(config, machine, form)))
    for form in TOKEN:
        found.append(_time(f"prompt/{form}", prompt_seconds(config, machine, form)))
    return found


def file_bytes(config: Config, form: str) -> float:
    """Of the trained model's file; speculation keeps two models, in int8."""
    model = config.recipe.model
    if form == "speculative":
        return sizes.file_bytes(model, "int8") + sizes.file_bytes(sizes.student_of(model), "int8")
    return sizes.file_bytes(model, form)


def _time(address: str, found: tuple[float, str]) -> Prediction:
    group, _, name = address.partition("/")
    suspect = SUSPECTS.get(name, SUSPECTS[group])
    return Prediction(address, "time_s", *found, suspect)


SUSPECTS = {
    "token": "whether the product reads with all cores, and what else uses the memory",
    "smaller": "products too small to keep all cores reading",
    "speculative": "the library's product for a few rows, which may not be the one for a single row",
    "cache": "one core reading where few heads are shared out, and a call for each head",
    "prompt": "the distance to the peak: MKL has plain code for other makers' CPUs, ours widens and packs",
    "bfloat16": "the library's bfloat16 product: without hardware for it, it converts, and that is the limit",
    "sparse": "columns in random order: the vector is gathered from cache",
    "lora": "two thin products beside each layer",
    "round": "the draft's small products, bound by calls more than by bytes",
}


def memory_bytes(config: Config) -> float:
    """The forms of the group that holds most of them, and the system's libraries."""
    whole = 4.0 * config.large.layers * sum(m.numbers for m in sizes.matrices(config.large))
    smaller = sum(
        sizes.token_bytes(config.large, form) for form in SMALLER if form not in ("lora", "early_exit")
    )
    return max(smaller, whole + cache_bytes(config, "float32")) + 0.6e9
